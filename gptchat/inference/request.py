"""What the engine is asked for, and what it gives: requests of token ids, and outputs.

`check_request` is the home of the rule which requests can be served at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gptchat.inference.draw import Scored
from gptchat.inference.sampling import Sampling
from gptchat.model.gpt2 import NO_TYPE_ROWS, GPT2Config

Ids = Sequence[int]


@dataclass(frozen=True)
class Request:
    """A prompt and how to answer it. Tokens that are drawn have the type of the prompt's last one.

    `token_type_ids` is as long as `input_ids`; None adds no types, which is not type 0. Drawing one
    of `stop_ids` ends the answer; it is not emitted. `score_prompt` asks for `prompt_logprobs`.
    """

    input_ids: Ids
    token_type_ids: Ids | None = None
    sampling: Sampling = Sampling()
    n: int = 1  # candidates
    stop_ids: Ids = ()
    score_prompt: bool = False

    @property
    def types(self) -> Ids:
        """`token_type_ids`, () where there are none."""
        return self.token_type_ids or ()


@dataclass
class Output:
    """What a step gives a candidate: a token, or the reason why there are no more, or both.

    `finish_reason` is "stop" (a stop id, or nothing left to draw), "length", or None: not the last.
    `logprob` and `top` are those of `Scored`; where a stop id ended the answer, `logprob` is its
    own. `prompt_logprobs` comes with the first output of a request that asked for it: an entry
    per token, the first one without a log-probability. `n_cached` comes with the same output: how
    many of the prompt's tokens were found in the cache.
    """

    request_id: int
    candidate: int
    token: int | None = None
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    finish_reason: str | None = None
    prompt_logprobs: list[Scored] | None = None
    n_cached: int = 0


def check_request(request: Request, slots: int, length: int, config: GPT2Config) -> None:
    """Raise ValueError with the reason if the request could never be served."""
    ids = request.input_ids
    types = request.token_type_ids
    vocab_size = config.vocab_size
    longest = length - 1 if request.sampling.max_new_tokens else length
    if not 1 <= len(ids) <= longest:
        raise ValueError(f"the prompt has {len(ids)} tokens, wanted from 1 to {longest}")
    for id in ids:
        if type(id) is not int:  # a float would end the pass of all requests
            raise ValueError(f"id {id!r} is no int")
        if not 0 <= id < vocab_size:
            raise ValueError(f"id {id} is not in the vocabulary of {vocab_size} entries")
    for id in request.stop_ids:
        if not 0 <= id < vocab_size:
            raise ValueError(f"stop id {id} is not in the vocabulary of {vocab_size} entries")
    for id in request.sampling.logit_bias:
        if id >= vocab_size:
            raise ValueError(f"id {id} of logit_bias is not in the vocabulary of {vocab_size}")
    if types is not None and config.type_rows == NO_TYPE_ROWS:
        raise ValueError("the model has no rows for token types, wanted token_type_ids None")
    if types is not None and (len(types) != len(ids) or not set(types) <= {0, 1}):
        raise ValueError(
            f"token_type_ids must be {len(ids)} numbers 0 or 1, one for each of the prompt's tokens"
        )
    if type(request.n) is not int or not 1 <= request.n <= slots:
        raise ValueError(f"n is {request.n}, wanted from 1 to {slots}, the number of slots")

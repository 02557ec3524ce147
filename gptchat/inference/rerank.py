"""Which of several candidate answers is given: the one of median length, or by mutual information.

Median length is the choice of the original program. Maximum mutual information (Li et al., "A
Diversity-Promoting Objective Function for Neural Conversation Models", 2016) asks not only how
likely an answer is after its context, but also how likely the context is after the answer, so that
one which would fit anything does not win. Theirs is a second model; here the ChatLM itself scores
the context's last turn as the reply to the answer. It can where it has learned the turns of both
speakers (`targets = "turns"` or "all"), or where both speak alike.
"""

from collections.abc import Sequence

from gptchat.data.dialogue import encode_prompt
from gptchat.inference.request import Ids, Output, Request
from gptchat.inference.sampling import Sampling

PICKS = ("first", "median", "mmi")
CANDIDATES = 5  # among which one is picked, as in the original program
CONTEXT_WEIGHT = 0.1  # of the context's log-probability, beside that of a token of the answer


def pick_median(texts: Sequence[str]) -> str:
    """The text of median length in characters; of two in the middle the longer one."""
    return sorted(texts, key=len)[len(texts) // 2]


def last_turn(prompt: Request, sep_id: int) -> Ids:
    """The ids of the turn that a ChatLM's prompt, [SEP] at its end, asks an answer to."""
    ids = list(prompt.input_ids[:-1])
    if sep_id in ids:
        return ids[len(ids) - ids[::-1].index(sep_id) :]
    return ids


def context_request(answer: Ids, context: Ids, sep_id: int) -> Request:
    """A request that generates nothing and scores `context` as the reply to `answer`."""
    length = len(answer) + len(context) + 1  # and [SEP]
    ids, types = encode_prompt([(0, answer)], context, sep_id, length)
    sampling = Sampling(max_new_tokens=0, logprobs=0)
    return Request(ids, types, sampling, score_prompt=True)


def context_logprob(output: Output, context: Ids) -> float:
    """The log-probability of `context` in the answer to its `context_request`."""
    scored = (output.prompt_logprobs or [])[-len(context) :] if context else []
    return sum(token.logprob or 0.0 for token in scored)


def mutual_information(answer_logprob: float, n_tokens: int, context_logprob: float) -> float:
    """The score of an answer: the higher, the better.

    `answer_logprob` is the sum over its `n_tokens` tokens, its end ([CLS]) included.
    """
    return answer_logprob / max(1, n_tokens) + CONTEXT_WEIGHT * context_logprob

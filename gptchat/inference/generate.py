"""From a model directory to text: what the terminal chat, the evaluation and the server share.

`load_generator` reads a directory and starts an engine over its model. A `TextGenerator` turns
encoded dialogues into requests (`request`) and runs requests to text: in pieces (`stream`), as
whole answers (`complete`), or with fixed seeds (`sample_answers`). Where a request has several
candidates, all are completed before `rank` chooses one. The server has a decoding loop of its own,
and uses `CandidateText`, `prompt_room` and `rank`.

- Ids that are no text (special tokens, type rows, rows without a token) are never generated, except
  the one that ends a text: [CLS] for a ChatLM, [EOS] for an LM.
- A prompt leaves room for the answer (`prompt_room`): an LM's text that is longer is refused, a
  ChatLM's dialogue loses its oldest turns and is refused only if its last turn is too long.
- Text holds whole characters and no stop string. What may become either is held back; an incomplete
  character at the end of an answer, which its length has cut, is left out.
- No U+FFFD for a broken character is in an answer, unless its setting `whole_characters` is 0 or
  its prompt is ids that end inside a character.
- An answer depends on its prompt, settings and seed, not on the requests that run beside it, nor
  (with `prefix_cache`) on earlier ones, except for the rounding that `engine` describes.
- A TextGenerator is for one thread, and for one stream at a time.
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from gptchat.console import UserError
from gptchat.data.dialogue import Turn, encode_prompt
from gptchat.data.tokenizer import Tokenizer
from gptchat.inference.draw import Scored
from gptchat.inference.engine import Engine, Output, Request
from gptchat.inference.pick import PICKS, last_turn, mutual_information, nearest_to_median
from gptchat.inference.sampling import Sampling
from gptchat.inference.text import CharacterFilter, StreamDecoder
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2, NO_TYPE_ROWS
from gptchat.model.pretrained import TRAINED_HERE, AnswerDefaults
from gptchat.runtime import default_device

SLOTS = 16  # default number of sequences that are decoded at once
NEW_TOKENS = 100  # default length of an answer, but for the server's
CHAT_SAMPLING = Sampling(**TRAINED_HERE.sampling, max_new_tokens=NEW_TOKENS)


def prompt_room(n_ctx: int, max_new_tokens: int) -> int:
    """How many of `n_ctx` tokens a prompt may take: all but the answer's, and at least half."""
    return n_ctx - min(max_new_tokens, n_ctx // 2)


class CandidateText:
    """The text of one candidate as its tokens arrive, up to a stop string or the candidate's end.

    `text` is everything so far. It starts with `echo`, a prompt to be repeated, in which stop
    strings do not count; then comes the text of `beginning`, ids of the answer that were given with
    the prompt, in which they do. `n_decoded` is the number of characters decoded so far, with those
    that are held back: where the text of the next token begins.

    `drawn` is what the engine drew, with the id that ended the answer; `n_tokens` are the tokens
    among it. `finish_reason` is "" until the candidate has ended, then "stop" (also for a stop
    string) or "length". `must_cancel` is true if a stop string ended the candidate while the
    engine, which knows no text, goes on with it: the caller cancels it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        beginning: Sequence[int] = (),
        echo: str = "",
    ):
        self._decoder = StreamDecoder(tokenizer, stop)
        self.text = echo
        for id in beginning:
            self.text += self._decoder.push(id)
        self.drawn: list[Scored] = []
        self.n_tokens = 0
        self.finish_reason = ""
        self.must_cancel = False

    @property
    def n_decoded(self) -> int:
        return len(self.text) + len(self._decoder.held)

    def take(self, output: Output) -> str:
        """Add the engine's next output. Returns the piece of text that is certain now."""
        if self.finish_reason:
            return ""
        piece = ""
        if output.scored is not None:
            self.drawn.append(output.scored)
        if output.token is not None:
            self.n_tokens += 1
            piece = self._decoder.push(output.token)
        if output.finish_reason:
            piece += self._decoder.finish()
        if self._decoder.stopped:
            self.finish_reason = "stop"
            self.must_cancel = output.finish_reason is None
        elif output.finish_reason:
            self.finish_reason = output.finish_reason
        self.text += piece
        return piece


@dataclass(frozen=True)
class Piece:
    """The next piece of text of the request at `index`, and whether its answer ends with it."""

    index: int
    text: str
    last: bool


class TextGenerator:
    """A model, its tokenizer and its task ("lm" or "chatlm"), with an engine that runs the model.

    `slots` is how many sequences are decoded at once, at least as many as the model wants
    candidates. `dtype` (of `linear.DTYPES`) is how the engine packs a copy of the layers; with None
    it uses the model's own weights, which may then be trained further. With `prefix_cache` (the
    engine's) a conversation's next turn starts sooner.

    `defaults` say how the model answers where nobody says otherwise: `sampling`, the number of
    `candidates` and the rule `default_pick` come from there. Raises UserError for wrong ones, and
    for a ChatLM whose tokenizer lacks a special token, or whose model lacks rows of token types.
    """

    def __init__(
        self,
        model: GPT2,
        tokenizer: Tokenizer,
        task: str,
        slots: int = SLOTS,
        dtype: str | None = None,
        prefix_cache: bool = False,
        defaults: AnswerDefaults = TRAINED_HERE,
    ):
        if task == "chatlm":
            tokenizer.require_specials()
            if model.config.type_rows == NO_TYPE_ROWS:
                raise UserError(
                    f"{tokenizer.source}: the model has no rows for token types; "
                    "wanted a ChatLM trained here"
                )
        try:
            self.sampling = Sampling(**defaults.sampling, max_new_tokens=NEW_TOKENS)
            self.check_pick(defaults.pick, task)
        except ValueError as error:
            raise UserError(f"{tokenizer.source}: generation_config.json: {error}") from None
        self.candidates = defaults.candidates
        self.default_pick = defaults.pick
        self.tokenizer = tokenizer
        self.task = task
        self.stop_ids = pretrained.stop_ids(model.config, tokenizer, task)
        self.n_vocab = model.config.vocab_size
        self.n_parameters = sum(parameter.numel() for parameter in model.parameters())
        never_generated = pretrained.never_generated(model.config, tokenizer, task)
        characters = CharacterFilter(tokenizer, model.config.vocab_size, model.wte.weight.device)
        self.engine = Engine(
            model,
            max(slots, self.candidates),
            dtype=dtype,
            suppress=never_generated,
            characters=characters,
            prefix_cache=prefix_cache,
        )
        self.n_ctx = self.engine.length

    def request(
        self,
        turns: Sequence[Turn],
        sampling: Sampling,
        n: int = 1,
        beginning: Sequence[int] = (),
    ) -> Request:
        """The request for `n` candidates of the answer to encoded turns.

        The answer starts with the ids in `beginning`, which are part of the prompt. An LM continues
        all turns and the beginning as one text, an empty one from [EOS]. A ChatLM drops the oldest
        turns until the rest fits into `prompt_room`. Raises UserError if the LM's text, or the
        ChatLM's last turn with the beginning, does not fit, and for an empty text without [EOS].
        """
        room = prompt_room(self.n_ctx, sampling.max_new_tokens)
        if self.task == "chatlm":
            ids, types = encode_prompt(turns, beginning, self.tokenizer.sep_id, room)
            return Request(ids, types, sampling, n=n, stop_ids=self.stop_ids)
        text = [*chain.from_iterable(turn_ids for _, turn_ids in turns), *beginning]
        if len(text) > room:
            raise UserError(f"prompt: the text takes {len(text)} tokens; wanted {room} at most")
        if not text and not self.stop_ids:
            raise UserError("prompt: the text is empty; wanted some, since the model has no [EOS]")
        return Request(text or [*self.stop_ids], None, sampling, n=n, stop_ids=self.stop_ids)

    def cut_to_fit(self, turns: Sequence[Turn], max_new_tokens: int) -> tuple[list[Turn], bool]:
        """(turns that `request` takes, whether text was cut): the last turn without its front.

        An LM's turns are joined to one. A ChatLM's older turns are left to `request`, which drops
        them.
        """
        longest = prompt_room(self.n_ctx, max_new_tokens)
        if self.task == "lm":
            turns = [(0, list(chain.from_iterable(ids for _, ids in turns)))]
        else:
            longest -= 1  # for the [SEP] before the answer
        speaker, ids = turns[-1]
        return [*turns[:-1], (speaker, ids[-longest:])], len(ids) > longest

    @staticmethod
    def check_pick(pick: str, task: str) -> None:
        """Raise ValueError for a rule that is not one of PICKS, or that an LM cannot have."""
        if pick not in PICKS:
            raise ValueError(f"pick: found {pick!r}; wanted one of {', '.join(PICKS)}")
        if pick == "mmi" and task != "chatlm":
            raise ValueError("pick mmi: found an LM; wanted a ChatLM, which answers a context")

    def stream(
        self, requests: Sequence[Request], stop: Sequence[str] = (), pick: str = "median"
    ) -> Generator[Piece]:
        """Run all requests at once, and yield the pieces of their answers as they come.

        A piece may be empty: a step of the engine yields one for every live candidate. A request
        for several candidates has empty pieces until all of them have ended; its last piece is the
        text of the one that is picked. Closing the generator cancels the unfinished requests.
        Raises ValueError if the engine can never serve a request (see `Engine.submit`), for a pick
        that the task cannot have, and for "mmi" without `logprobs`.
        """
        self.check_pick(pick, self.task)
        if pick == "mmi" and any(r.n > 1 and r.sampling.logprobs is None for r in requests):
            raise ValueError("mmi needs log-probabilities; wanted logprobs of 0 or more")
        unfinished: dict[int, int] = {}  # the engine's id -> index of a request
        candidates = [
            [CandidateText(self.tokenizer, stop) for _ in range(request.n)] for request in requests
        ]
        try:
            for index, request in enumerate(requests):
                unfinished[self.engine.submit(request)] = index
            while unfinished:
                for output in self.engine.step():
                    index = unfinished[output.request_id]
                    candidate = candidates[index][output.candidate]
                    text = candidate.take(output)
                    if candidate.must_cancel:
                        self.engine.cancel(output.request_id, output.candidate)
                    last = all(one.finish_reason for one in candidates[index])
                    if last:
                        del unfinished[output.request_id]
                    if len(candidates[index]) > 1:
                        text = ""
                        if last:
                            best = self.rank(pick, requests[index], candidates[index])[0]
                            text = candidates[index][best].text
                    yield Piece(index, text, last)
        finally:
            for request_id in unfinished:
                self.engine.cancel(request_id)

    def rank(self, rule: str, request: Request, candidates: Sequence[CandidateText]) -> list[int]:
        """The numbers of the completed candidates of a request, best first by a rule of PICKS.

        "mmi" runs the model, and needs log-probabilities. Candidates without text come last there.
        """
        numbers = list(range(len(candidates)))
        texts = [candidate.text for candidate in candidates]
        if rule == "first" or len(candidates) == 1:
            return numbers
        if rule == "median":
            return nearest_to_median(texts)
        drawn = [candidate.drawn for candidate in candidates]
        scores = mutual_information(
            self.engine.model,
            self.tokenizer.sep_id,
            context=last_turn(request.input_ids, self.tokenizer.sep_id),
            answers=[[scored.token for scored in one] for one in drawn],
            logprobs=[sum(scored.logprob or 0.0 for scored in one) for one in drawn],
        )
        has_text = [text != "" for text in texts]
        return sorted(numbers, key=lambda number: (has_text[number], scores[number]), reverse=True)

    def complete(
        self, requests: Sequence[Request], stop: Sequence[str] = (), pick: str = "median"
    ) -> list[str]:
        """The whole answer to each request, in order."""
        texts = [""] * len(requests)
        for piece in self.stream(requests, stop, pick):
            texts[piece.index] += piece.text
        return texts

    def sample_answers(self, dialogues: Iterable[Sequence[Turn]]) -> list[str]:
        """One answer to each encoded dialogue (an LM's continuation), the same at every call.

        The settings are the model's, dialogue number i has the seed i. What is too long is cut by
        `cut_to_fit`.
        """
        requests = []
        for number, turns in enumerate(dialogues):
            fitting, _ = self.cut_to_fit(turns, self.sampling.max_new_tokens)
            requests.append(self.request(fitting, self.sampling.for_item(number)))
        return self.complete(requests)


def load_generator(
    directory: str | Path,
    slots: int = SLOTS,
    dtype: str = "auto",
    device: str = "",
    prefix_cache: bool = False,
) -> TextGenerator:
    """Read a model directory and start an engine over its model.

    `dtype` is one of `linear.DTYPES`, or "auto": int8 or bfloat16 where that is fast. The device is
    that of `default_device` if none is given. Raises UserError for a directory that cannot be read.
    """
    model, tokenizer, task = pretrained.load_model(directory, device or default_device())
    defaults = pretrained.answer_defaults(directory)
    return TextGenerator(model, tokenizer, task, slots, dtype, prefix_cache, defaults)

"""From a model directory to text, for terminal chat, evaluation and server.

A `TextGenerator` turns encoded dialogues into requests (`request`) and runs them to text: in pieces
(`stream`), as whole answers (`complete`) or with fixed seeds (`sample_answers`). The server has a
decoding loop of its own, and uses `CandidateText`, `prompt_room` and `rank`.

- Ids without text are never generated, except the one that ends an answer: [CLS] for a ChatLM,
  [EOS] for an LM.
- A prompt leaves room for the answer (`prompt_room`).
- Text holds whole characters and no stop string. What may become either is held back.
- An answer depends only on its prompt, settings and seed, up to the rounding that `engine`
  describes.
- A TextGenerator serves one thread, and one stream at a time.
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
from gptchat.inference.pick import PICKS, mutual_information, nearest_to_median, turns_of
from gptchat.inference.sampling import Sampling
from gptchat.inference.text import CharacterFilter, StreamDecoder
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2, NO_TYPE_ROWS
from gptchat.model.pretrained import TRAINED_HERE, AnswerDefaults
from gptchat.runtime import default_device

SLOTS = 16  # default number of sequences that are decoded at once
NEW_TOKENS = 100  # default length of an answer, but for the server's


def prompt_room(n_ctx: int, max_new_tokens: int) -> int:
    """How many of `n_ctx` tokens a prompt may take: all but the answer's, but at least half."""
    return n_ctx - min(max_new_tokens, n_ctx // 2)


class CandidateText:
    """The text of one candidate as its tokens arrive, up to a stop string or its end.

    `text` starts with `echo`, a prompt to repeat, where stop strings do not count. The text of
    `beginning` follows, ids of the answer given with the prompt, where they do.

    `drawn` is what the engine drew, with the id that ended the answer; `n_tokens` leaves that out.
    `finish_reason` is "" until the candidate has ended, then "stop" or "length". `must_cancel`: a
    stop string ended the candidate, and the caller must cancel it in the engine.
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
        """Characters so far, with those held back: where the text of the next token begins."""
        return len(self.text) + len(self._decoder.held)

    def take(self, output: Output) -> str:
        """Add the engine's next output. Returns the text that has become certain."""
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

    `slots` (at least the default number of candidates), `dtype` and `prefix_cache` are the
    engine's. With a `dtype` of None the model may be trained further.

    `defaults` are the model's sampling settings, number of candidates and pick. Raises UserError
    for wrong ones, and for a ChatLM without special tokens or rows of token types.
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

        The answer starts with the ids in `beginning`, which count as prompt. An LM continues all of
        it as one text, an empty one from [EOS]. A ChatLM drops its oldest turns until the rest fits
        into `prompt_room`. Raises UserError for what does not fit, and for an empty text without
        [EOS].
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
        """(turns that `request` takes, whether the front of the last one was cut).

        An LM's turns are joined to one. A ChatLM's older turns are left to `request`.
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
        """Raise ValueError for a rule that is not one of PICKS, or that an LM cannot use."""
        if pick not in PICKS:
            raise ValueError(f"pick: found {pick!r}; wanted one of {', '.join(PICKS)}")
        if pick == "mmi" and task != "chatlm":
            raise ValueError("pick mmi: found an LM; wanted a ChatLM, which answers a context")

    def stream(
        self, requests: Sequence[Request], stop: Sequence[str] = (), pick: str = "median"
    ) -> Generator[Piece]:
        """Run all requests at once, and yield the pieces of their answers as they come.

        A step of the engine yields a piece, maybe an empty one, for every live candidate. A request
        for several candidates has only empty pieces before the last, the text of the one picked.
        Closing the generator cancels unfinished requests. Raises ValueError for a request that the
        engine can never serve, and for a pick that the task or its sampling cannot have.
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
        """The numbers of a request's completed candidates, best first by a rule of PICKS.

        "mmi" runs the model and needs log-probabilities. It puts candidates last that have no text
        or say again what a turn of the prompt has said.
        """
        numbers = list(range(len(candidates)))
        if rule == "first" or len(candidates) == 1:
            return numbers
        if rule == "median":
            return nearest_to_median([candidate.text for candidate in candidates])
        *turns, beginning = turns_of(request.input_ids, self.tokenizer.sep_id)
        drawn = [candidate.drawn for candidate in candidates]
        answers = [[scored.token for scored in one] for one in drawn]
        scores = mutual_information(
            self.engine.model,
            self.tokenizer.sep_id,
            context=turns[-1],
            answers=answers,
            logprobs=[sum(scored.logprob or 0.0 for scored in one) for one in drawn],
        )
        says_more = [
            candidate.text != "" and beginning + answer[: candidate.n_tokens] not in turns
            for candidate, answer in zip(candidates, answers, strict=True)
        ]
        return sorted(numbers, key=lambda number: (says_more[number], scores[number]), reverse=True)

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

        Dialogue number i has seed i, and `cut_to_fit` cuts it.
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
    """Read a model directory and start an engine. Raises UserError if it cannot be read.

    A `device` of "" means `default_device()`.
    """
    model, tokenizer, task = pretrained.load_model(directory, device or default_device())
    defaults = pretrained.answer_defaults(directory)
    return TextGenerator(model, tokenizer, task, slots, dtype, prefix_cache, defaults)

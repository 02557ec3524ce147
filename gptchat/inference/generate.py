"""From a model directory to text: what the terminal chat, the evaluation and the server share.

`load_generator` reads a directory and starts an engine over its model. The `TextGenerator` that it
returns turns encoded dialogues into requests (`request`) and runs requests to text: in pieces as
they come (`stream`), as whole answers (`complete`), or with fixed settings and seeds
(`sample_answers`). `CandidateText` is the text of one candidate while its tokens arrive. The server
has a decoding loop of its own, and uses `CandidateText` and `prompt_room` directly.

Promises and invariants:
- Ids that stand for no text (special tokens, type rows, rows without a token) are never generated,
  except the one that ends a text: [CLS] for a ChatLM, [EOS] for an LM.
- A prompt leaves room for the answer (`prompt_room`): an LM's text that is longer is refused, a
  ChatLM's dialogue loses its oldest turns and is refused only if its last turn is too long.
- Text holds whole characters and no stop string. What may become either is held back; an incomplete
  character at the end of an answer, which its length has cut, is left out.
- No U+FFFD stands for broken characters in an answer, unless its setting `whole_characters` is 0 or
  its prompt is ids that end inside a character.
- An answer depends on its prompt, settings and seed, not on the requests that run beside it, and
  with `prefix_cache` not on earlier ones, except for rounding, which matters with bfloat16 and int8
  (`engine` says how much).
- A TextGenerator is for one thread, and for one stream at a time.
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from gptchat.console import UserError
from gptchat.data.dialogue import Turn, encode_prompt
from gptchat.data.tokenizer import Tokenizer
from gptchat.inference import rerank
from gptchat.inference.engine import Engine, Output, Request
from gptchat.inference.request import Ids
from gptchat.inference.sampling import Sampling
from gptchat.inference.text import CharacterFilter, StreamDecoder
from gptchat.model import pretrained
from gptchat.model.devices import default_device
from gptchat.model.gpt2 import GPT2, NO_TYPE_ROWS

SLOTS = 16  # default number of sequences that are decoded at once
# Default settings of the terminal chat, the evaluation and the original's API (but for the length,
# which is a setting of the server); for small models.
CHAT_SAMPLING = Sampling(
    temperature=0.6, top_k=40, top_p=0.95, repetition_penalty=1.15, max_new_tokens=100
)


def prompt_room(n_ctx: int, max_new_tokens: int) -> int:
    """How many of `n_ctx` tokens a prompt may take: all but the answer's, and at least half."""
    return n_ctx - min(max_new_tokens, n_ctx // 2)


class CandidateText:
    """The text of one candidate as its tokens arrive, up to a stop string or the candidate's end.

    `text` is everything so far. It starts with `echo`, a prompt to be repeated, in which stop
    strings do not count; then comes the text of `beginning`, ids of the answer that were given with
    the prompt, in which they do. `n_decoded` is the number of characters decoded so far, with those
    that are held back: where the text of the next token begins.

    `n_tokens` counts the generated tokens. Where the request asked for log-probabilities, `logprob`
    is the sum of `n_scored` of them, those of the tokens and of the id that ended the answer.
    `finish_reason` is "" until the candidate has ended, then "stop" (also for a stop string) or
    "length". `must_cancel` is true if a stop string ended the candidate while the engine, which
    knows no text, goes on with it: the caller cancels it.
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
        self.n_tokens = 0
        self.n_scored = 0
        self.logprob = 0.0
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
        if output.logprob is not None:
            self.n_scored += 1
            self.logprob += output.logprob
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


@dataclass
class _Pending:
    """A request of a stream: its candidates, and the scores of those that have one.

    `context` are the ids of the turn that a ChatLM answers.
    """

    index: int
    context: Ids
    candidates: list[CandidateText]
    scores: dict[int, float] = field(default_factory=dict)  # by the candidate's number

    @property
    def has_ended(self) -> bool:
        return all(candidate.finish_reason for candidate in self.candidates)

    @property
    def best(self) -> str:
        """The text of the candidate with the highest score; one without text only if all are."""

        def rank(number: int) -> tuple[bool, float]:
            return self.candidates[number].text != "", self.scores[number]

        return self.candidates[max(self.scores, key=rank)].text


class TextGenerator:
    """A model, its tokenizer and its task ("lm" or "chatlm"), with an engine that runs the model.

    `slots` is how many sequences are decoded at once, `dtype` (of `linear.DTYPES`) how the engine
    packs a copy of the layers; with None it uses the model's own weights, which may then be trained
    further. With `prefix_cache` (the engine's) a conversation's next turn starts sooner. Raises
    UserError for a ChatLM whose tokenizer lacks a special token, or whose model lacks the rows of
    token types.
    """

    def __init__(
        self,
        model: GPT2,
        tokenizer: Tokenizer,
        task: str,
        slots: int = SLOTS,
        dtype: str | None = None,
        prefix_cache: bool = False,
    ):
        if task == "chatlm":
            tokenizer.require_specials()
            if model.config.type_rows == NO_TYPE_ROWS:
                raise UserError(
                    f"{tokenizer.source}: the model has no rows for token types; "
                    "wanted a ChatLM trained here"
                )
        self.tokenizer = tokenizer
        self.task = task
        self.stop_ids = pretrained.stop_ids(model.config, tokenizer, task)
        self.n_vocab = model.config.vocab_size
        self.n_parameters = sum(parameter.numel() for parameter in model.parameters())
        never_generated = pretrained.never_generated(model.config, tokenizer, task)
        characters = CharacterFilter(tokenizer, model.config.vocab_size, model.wte.weight.device)
        self.engine = Engine(
            model,
            slots,
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

    def stream(
        self, requests: Sequence[Request], stop: Sequence[str] = (), pick: str = "median"
    ) -> Generator[Piece]:
        """Run all requests at once, and yield the pieces of their answers as they come.

        A piece may be empty: a step of the engine yields one for every live candidate. A request
        for several candidates has empty pieces until all of them have ended; its last piece is the
        one of median length, or with `pick` = "mmi" the one that rerank.py says. Closing the
        generator cancels the unfinished requests. Raises ValueError if the engine can never serve a
        request (see `Engine.submit`), and for "mmi" of an LM or without `logprobs`.
        """
        if pick == "mmi" and self.task != "chatlm":
            raise ValueError("mmi is for a ChatLM, which answers a context")
        if pick == "mmi" and any(r.n > 1 and r.sampling.logprobs is None for r in requests):
            raise ValueError("mmi needs log-probabilities; wanted logprobs of 0 or more")
        unfinished: dict[int, _Pending] = {}  # by the engine's request id
        scoring: dict[int, tuple[_Pending, int]] = {}  # and the number of the candidate
        try:
            for index, request in enumerate(requests):
                candidates = [CandidateText(self.tokenizer, stop) for _ in range(request.n)]
                context = rerank.last_turn(request, self.tokenizer.sep_id)
                pending = _Pending(index, context, candidates)
                unfinished[self.engine.submit(request)] = pending
            while unfinished or scoring:
                for output in self.engine.step():
                    if output.request_id in scoring:
                        pending, number = scoring.pop(output.request_id)
                        self._note_score(pending, number, output)
                        last = len(pending.scores) == len(pending.candidates)
                        yield Piece(pending.index, pending.best if last else "", last)
                        continue
                    pending = unfinished[output.request_id]
                    candidate = pending.candidates[output.candidate]
                    text = candidate.take(output)
                    if candidate.must_cancel:
                        self.engine.cancel(output.request_id, output.candidate)
                    last = pending.has_ended
                    if last:
                        del unfinished[output.request_id]
                    if len(pending.candidates) > 1:
                        text = ""
                        if last and pick == "mmi":
                            self._start_scoring(pending, scoring)
                            last = False
                        elif last:
                            text = rerank.pick_median([c.text for c in pending.candidates])
                    yield Piece(pending.index, text, last)
        finally:
            for request_id in [*unfinished, *scoring]:
                self.engine.cancel(request_id)

    def _start_scoring(self, pending: _Pending, scoring: dict[int, tuple[_Pending, int]]) -> None:
        """Ask the engine for the context's log-probability after each candidate.

        `scoring` gets each request's id at once, so that whoever stops can cancel it.
        """
        room = self.n_ctx - len(pending.context) - 1  # for [SEP]
        for number, candidate in enumerate(pending.candidates):
            # The text without a stop string. Broken characters take more ids than had been drawn.
            said = self.tokenizer.encode(candidate.text)[:room]
            request = rerank.context_request(said, pending.context, self.tokenizer.sep_id)
            scoring[self.engine.submit(request, next_in_line=True)] = (pending, number)

    def _note_score(self, pending: _Pending, number: int, output: Output) -> None:
        candidate = pending.candidates[number]
        context_logprob = rerank.context_logprob(output, pending.context)
        pending.scores[number] = rerank.mutual_information(
            candidate.logprob, candidate.n_scored, context_logprob
        )

    def complete(
        self, requests: Sequence[Request], stop: Sequence[str] = (), pick: str = "median"
    ) -> list[str]:
        """The whole answer to each request, in order."""
        texts = [""] * len(requests)
        for piece in self.stream(requests, stop, pick):
            texts[piece.index] += piece.text
        return texts

    def sample_answers(self, dialogues: Iterable[Sequence[Turn]]) -> list[str]:
        """An answer to each encoded dialogue (an LM's continuation), the same ones at every call.

        They are drawn with `CHAT_SAMPLING`; the seed is the dialogue's number. What is too long is
        cut by `cut_to_fit`.
        """
        requests = []
        for seed, turns in enumerate(dialogues):
            fitting, _ = self.cut_to_fit(turns, CHAT_SAMPLING.max_new_tokens)
            requests.append(self.request(fitting, replace(CHAT_SAMPLING, seed=seed)))
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
    that of `default_device` if none is given, `prefix_cache` that of `TextGenerator`. Raises
    UserError for a directory that cannot be read.
    """
    model, tokenizer, task = pretrained.load_model(directory, device or default_device())
    return TextGenerator(model, tokenizer, task, slots, dtype, prefix_cache=prefix_cache)

"""A model directory that answers: what the terminal chat, the evaluation and the server share.

`load_generator` reads a directory and starts an engine over it. Its `TextGenerator` turns dialogues into requests
(`request`), and runs them to text, in pieces as they come (`stream`) or whole (`complete`). `CandidateText` is the
text of one candidate as its tokens arrive, up to a stop string.
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gptchat.console import UserError
from gptchat.data.dialogue import Turn, encode_prompt
from gptchat.data.tokenizer import Tokenizer
from gptchat.inference.engine import Engine, Output, Request
from gptchat.inference.sampling import Sampling
from gptchat.inference.text import StreamDecoder
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2

CANDIDATES = 5  # answers of which the one of median length is picked, as the original program did
SLOTS = 16  # sequences that are decoded at once, where nobody says otherwise
# Suits small models: what the terminal chat, the evaluation and the original's API use unless told otherwise.
CHAT_SAMPLING = Sampling(
    temperature=0.6, top_k=40, top_p=0.95, repetition_penalty=1.15, max_new_tokens=100
)


def pick_median(texts: Sequence[str]) -> str:
    """The text of median length; of two in the middle the longer one."""
    return sorted(texts, key=len)[len(texts) // 2]


def prompt_room(n_ctx: int, max_new_tokens: int) -> int:
    """How many tokens a prompt may have: the answer's tokens are kept free, but never more than half of `n_ctx`."""
    return n_ctx - min(max_new_tokens, n_ctx // 2)


class CandidateText:
    """The text of one candidate as its tokens come, up to a stop string or to the candidate's end.

    `text` is all of it so far, `finish_reason` is "" until it has ended. `beginning` are ids of the answer that were
    given with the prompt: they count as text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), beginning: Sequence[int] = ()
    ):
        self.decoder = StreamDecoder(tokenizer, stop)
        self.text = "".join(self.decoder.push(id) for id in beginning)
        self.finish_reason = ""
        self.n_tokens = 0

    def take(self, output: Output) -> str:
        """Add what the engine says of the candidate. Returns the piece of text that is certain now."""
        if self.finish_reason:
            return ""
        piece = ""
        if output.token is not None:
            self.n_tokens += 1
            piece = self.decoder.push(output.token)
        if self.decoder.stopped:
            self.finish_reason = "stop"
        elif output.finish_reason:
            piece += self.decoder.finish()
            self.finish_reason = "stop" if self.decoder.stopped else output.finish_reason
        self.text += piece
        return piece


@dataclass(frozen=True)
class Piece:
    """What `stream` has to say about a request: the next piece of its answer, and whether it is the last."""

    index: int
    text: str
    last: bool


class TextGenerator:
    """A model, its tokenizer and task ("lm" or "chatlm"), and an engine that runs it.

    `dtype` is what the engine packs the layers as (`linear.DTYPES`); None takes the model as it is, which then stays
    fit for training.
    """

    def __init__(
        self,
        model: GPT2,
        tokenizer: Tokenizer,
        task: str,
        slots: int = SLOTS,
        dtype: str | None = None,
    ):
        if task == "chatlm":
            tokenizer.require_specials()
        self.tokenizer, self.task = tokenizer, task
        self.n_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.stop_id = pretrained.stop_id(tokenizer, task)
        never_generated = pretrained.never_generated(model.config, tokenizer, task)
        self.engine = Engine(model, slots, dtype=dtype, suppress=never_generated)
        self.n_ctx = self.engine.length

    def request(
        self,
        turns: Sequence[Turn],
        sampling: Sampling,
        n: int = 1,
        beginning: Sequence[int] = (),
    ) -> Request:
        """The request that answers encoded turns, or, for an LM, continues them as one text.

        The oldest turns are dropped until `prompt_room` is kept. Raises UserError where the last turn (for an LM: the
        text) is too long.
        """
        room = prompt_room(self.n_ctx, sampling.max_new_tokens)
        if self.task == "chatlm":
            tokenizer = self.tokenizer
            ids, types = encode_prompt(turns, beginning, tokenizer.cls_id, tokenizer.sep_id, room)
            return Request(ids, types, sampling, n, (self.stop_id,))
        text = [id for _, turn in turns for id in turn] or [self.tokenizer.eos_id]
        if len(text) > room:
            raise UserError(f"prompt: the text takes {len(text)} tokens; wanted {room} at most")
        return Request(text, None, sampling, n, (self.stop_id,))

    def stream(self, requests: Sequence[Request], stop: Sequence[str] = ()) -> Generator[Piece]:
        """The pieces of all answers as they come, all requests at once.

        A request with several candidates gives one piece, the candidate of median length, when all have ended.
        Closing the generator cancels what is unfinished.
        """
        index_of: dict[int, int] = {}  # the engine's request id -> index in `requests`
        candidates = [
            [CandidateText(self.tokenizer, stop) for _ in range(request.n)] for request in requests
        ]
        unfinished: set[tuple[int, int]] = set()  # (request id, candidate)
        try:
            for index, request in enumerate(requests):
                request_id = self.engine.submit(request)
                index_of[request_id] = index
                unfinished |= {(request_id, candidate) for candidate in range(request.n)}
            while unfinished:
                for output in self.engine.step():
                    key = (output.request_id, output.candidate)
                    index = index_of[output.request_id]
                    candidate = candidates[index][output.candidate]
                    piece = candidate.take(output)
                    if candidate.finish_reason:
                        self.engine.cancel(*key)
                        unfinished.discard(key)
                    last = all(candidate.finish_reason for candidate in candidates[index])
                    if len(candidates[index]) > 1:
                        texts = [candidate.text for candidate in candidates[index]]
                        piece = pick_median(texts) if last else ""
                    yield Piece(index, piece, last)
        finally:
            for key in unfinished:
                self.engine.cancel(*key)

    def complete(self, requests: Sequence[Request], stop: Sequence[str] = ()) -> list[str]:
        """The whole answer to each request, in order."""
        texts = [""] * len(requests)
        for piece in self.stream(requests, stop):
            texts[piece.index] += piece.text
        return texts

    def sample_answers(self, dialogues: Iterable[Sequence[Turn]]) -> list[str]:
        """An answer to each dialogue (for an LM: its continuation), drawn as in a chat, the same each time.

        Turns that are too long are cut from the front, as training cuts them.
        """
        longest = self.n_ctx // 2 - 1
        requests = []
        for seed, turns in enumerate(dialogues):
            kept = [(speaker, ids[-longest:]) for speaker, ids in turns]
            requests.append(self.request(kept, replace(CHAT_SAMPLING, seed=seed)))
        return self.complete(requests)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_generator(
    directory: str | Path, slots: int = SLOTS, dtype: str = "auto", device: str = ""
) -> TextGenerator:
    """Read a model directory and start an engine over it. Raises UserError where it cannot be read."""
    model, tokenizer, task = pretrained.load_model(directory, device or default_device())
    return TextGenerator(model, tokenizer, task, slots, dtype)

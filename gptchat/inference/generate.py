"""A model directory that generates text: what chat, evaluation and server share."""

import argparse
import random
from collections.abc import Generator, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from gptchat.console import UserError
from gptchat.data.dialogue import Turn, encode_prompt
from gptchat.data.tokenizer import Tokenizer
from gptchat.inference.engine import Engine, Request, generate
from gptchat.inference.sampling import Sampling
from gptchat.inference.text import StreamDecoder, WordFilter
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2

CHAT = Sampling(
    temperature=0.6, top_k=40, top_p=0.95, repetition_penalty=1.15, max_new_tokens=100
)  # for small models


def make_request(
    tokenizer: Tokenizer,
    task: str,
    turns: Sequence[Turn],
    n_ctx: int,
    sampling: Sampling,
    n: int = 1,
) -> Request:
    """The request that answers a dialogue, or for an LM goes on with its turns as one text.

    Room for `max_new_tokens` (but not more than half of `n_ctx`) is kept by dropping the oldest turns. Raises UserError
    where the last turn, for an LM the text, leaves too little.
    """
    room = n_ctx - min(sampling.max_new_tokens, n_ctx // 2)
    stop_ids = (pretrained.stop_id(tokenizer, task),)
    if task == "chatlm":
        ids, types = encode_prompt(turns, [], tokenizer.cls_id, tokenizer.sep_id, room)
        return Request(ids, types, sampling, n, stop_ids)
    text = [id for _, turn in turns for id in turn] or [tokenizer.eos_id]
    if len(text) > room:
        raise UserError(f"prompt: the text takes {len(text)} tokens; wanted {room} at most")
    return Request(text, None, sampling, n, stop_ids)


def answers(
    model: GPT2, tokenizer: Tokenizer, task: str, dialogues: Iterable[Sequence[Turn]]
) -> list[str]:
    """What the model answers to each dialogue, or how it goes on with it: drawn as in a chat, the same each time."""
    n_ctx = model.config.n_positions
    cut = [
        [(speaker, ids[1 - n_ctx // 2 :]) for speaker, ids in turns] for turns in dialogues
    ]  # as training cuts them
    requests = [
        make_request(tokenizer, task, turns, n_ctx, replace(CHAT, seed=i))
        for i, turns in enumerate(cut)
    ]
    never = pretrained.never_generated(model.config, tokenizer, task)
    engine = Engine(model, max(1, min(16, len(requests))), suppress=never)
    return [tokenizer.decode(candidates[0].ids) for candidates in generate(engine, requests)]


CANDIDATES = 5  # of which --pick median takes the one of median length


class Talk:
    """A loaded model and its engine, which answer dialogues of texts; a turn is (speaker, text)."""

    def __init__(self, directory: str | Path, slots: int, dtype: str):
        model, self.tokenizer, self.task = pretrained.load_model(directory)
        self.size = sum(parameter.numel() for parameter in model.parameters())
        if self.task == "chatlm":
            self.tokenizer.require_specials()
        never = pretrained.never_generated(model.config, self.tokenizer, self.task)
        self.engine = Engine(model, slots, dtype=dtype, suppress=never)

    def sampling(self, settings: argparse.Namespace) -> Sampling:
        """Raises UserError for a setting out of its range."""
        values = {
            f.name: getattr(settings, f.name) for f in fields(Sampling) if hasattr(settings, f.name)
        }
        values["seed"] = random.getrandbits(63) if settings.seed < 0 else settings.seed
        words = [word for word in settings.forbid if word]
        try:
            return Sampling(
                **values, word_filter=WordFilter(self.tokenizer, words) if words else None
            )
        except ValueError as error:
            raise UserError(str(error)) from None

    def request(self, turns: Sequence[tuple[int, str]], settings: argparse.Namespace) -> Request:
        """What is to be answered. Raises UserError for a last turn that is too long."""
        encoded = [
            (speaker, self.tokenizer.encode(text.encode(errors="replace").decode()))
            for speaker, text in turns
        ]
        n = CANDIDATES if settings.pick == "median" else 1
        return make_request(
            self.tokenizer, self.task, encoded, self.engine.length, self.sampling(settings), n
        )

    def answers(
        self, requests: Sequence[Request], stop: Sequence[str]
    ) -> Generator[tuple[int, str, bool]]:
        """(request's index, next piece of its answer, whether it is the last), all requests at once. Of several
        candidates the one of median length comes in one piece. Closing the generator cancels what is unfinished."""
        running: dict[tuple[int, int], tuple[int, StreamDecoder]] = {}
        texts = [[""] * request.n for request in requests]
        left = [request.n for request in requests]
        try:
            for index, request in enumerate(requests):
                id = self.engine.submit(request)
                for candidate in range(request.n):
                    running[id, candidate] = (
                        index,
                        StreamDecoder(self.tokenizer, [text for text in stop if text]),
                    )
            while running:
                for output in self.engine.step():
                    key = output.request_id, output.candidate
                    index, decoder = running[key]
                    piece = "" if output.token is None else decoder.push(output.token)
                    if output.finish_reason or decoder.stopped:
                        piece += decoder.finish()
                        left[index] -= 1
                        self.engine.cancel(*key)
                        del running[key]
                    texts[index][output.candidate] += piece
                    whole = (
                        "" if left[index] else sorted(texts[index], key=len)[requests[index].n // 2]
                    )
                    yield index, piece if requests[index].n == 1 else whole, not left[index]
        finally:
            for key in running:
                self.engine.cancel(*key)

"""Documents out of files, ids out of text, in parallel."""

import codecs
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from io import IncrementalNewlineDecoder
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gptchat.config import Config
from gptchat.console import UserError
from gptchat.data.dialogue import alternate
from gptchat.data.tokenizer import Tokenizer, tokenizer_for

A = TypeVar("A")

B = TypeVar("B")

BLOCK = 1 << 20  # characters encoded at once

CACHED = 2_000_000  # characters of words in a cache

SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s of GPT-2's pattern, not Python's

WORDS = re.compile(rf" ?[^{SPACE}]+|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+")

SEPARATOR = {"block": r"\n(?:[^\S\n]*\n)+", "line": "\n", "file": "(?!)"}

BLANK_START = re.compile(r"\A(?:\s*\n|\s+\Z)")


class Encoded(NamedTuple):
    """What a block appends to each file; where documents and turns end is counted from the block's beginning."""

    tokens: bytes
    documents: np.ndarray
    turns: np.ndarray
    speakers: bytes
    n_bytes: int


def in_order(
    executor: Executor, function: Callable[[A], B], items: Iterable[A], ahead: int
) -> Iterator[B]:
    """`map` in an executor with at most `ahead` items under way; results in the items' order."""
    pending: deque = deque()
    for item in items:
        pending.append(executor.submit(function, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def read_documents(path: Path, document: str, size: int) -> Iterator[tuple[str, bool]]:
    """(text, whether the document ends with it) for all that hold more than white space. One longer than `size` comes
    in pieces, cut where white space begins, which no byte-level token spans; anywhere if there is none.

    Raises UserError with file and byte for invalid UTF-8.
    """
    separator, decoder = (
        re.compile(SEPARATOR[document]),
        codecs.getincrementaldecoder("utf-8-sig")(),
    )
    lines, rest, inside, data = IncrementalNewlineDecoder(decoder, translate=True), "", False, b" "
    with open(path, "rb") as file:
        while data:
            data = file.read(size)
            try:
                *texts, rest = separator.split(rest + lines.decode(data, not data))
            except UnicodeDecodeError as error:
                at = file.tell() - len(error.object) + error.start
                raise UserError(
                    f"{path}: byte {at}: found invalid UTF-8 ({error.reason})"
                ) from None
            for text in texts if data else [*texts, rest.rstrip("\n")]:
                if inside or (text := BLANK_START.sub("", text)):
                    yield text, True
                inside = False
            if len(rest) >= size:
                rest = rest if inside else BLANK_START.sub("", rest)
                cut = re.match(r"(?s:.*)\S(?=\s)", rest)
                piece = rest[: cut.end() if cut else None]
                if data and piece:
                    yield piece, False
                    rest, inside = rest[len(piece) :], True


def in_blocks(items: Iterable[A], length: Callable[[A], int]) -> Iterator[list[A]]:
    """Lists of items with BLOCK characters or a little more."""
    block, n = [], 0
    for item in items:
        block.append(item)
        n += length(item)
        if n >= BLOCK:
            yield block
            block, n = [], 0
    if block:
        yield block


def splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether no token spans the beginning of white space: byte-level with GPT-2's pattern, and nothing before it."""
    settings = json.loads(tokenizer.backend.to_str())
    step = settings["pre_tokenizer"] or {"type": None}
    return (
        step["type"] == "ByteLevel"
        and step["use_regex"]
        and not step["add_prefix_space"]
        and settings["normalizer"] is None
        and all(token["special"] for token in settings["added_tokens"])
    )


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 65535 else "<u4")


class Encoder:
    """Blocks -> ids. Where the tokenizer splits at white space, each distinct word is encoded once and then looked up:
    equal to encoding the whole text, and several times as fast."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.dtype, self.by_words = (
            tokenizer,
            token_dtype(tokenizer),
            splits_at_spaces(tokenizer),
        )
        self.words: dict[str, bytes] = {}
        self.n_cached = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Each text's ids, as bytes of the shards' dtype."""
        if not self.by_words:
            return self._encode_each(texts)
        split = [WORDS.findall(text) for text in texts]
        missing = list(set().union(*split) - self.words.keys())
        if 2 * len(missing) > sum(map(len, split)) > 10_000:  # hardly a word twice: numbers, say
            return self._encode_each(texts)
        self.words.update(zip(missing, self._encode_each(missing), strict=True))
        encoded = [b"".join(map(self.words.__getitem__, words)) for words in split]
        self.n_cached += sum(map(len, missing))
        if self.n_cached > CACHED:
            self.words, self.n_cached = {}, 0
        return encoded

    def _encode_each(self, texts: Sequence[str]) -> list[bytes]:
        return [np.array(ids, self.dtype).tobytes() for ids in self.tokenizer.encode_batch(texts)]

    def documents(self, block: list[tuple[str, bool]]) -> Encoded:
        """Pieces of text, an [EOS] behind each that ends a document."""
        texts, ended = zip(*block, strict=True)
        eos = self.dtype.type(self.tokenizer.eos_id).tobytes()
        ids = [data + eos * ends for data, ends in zip(self.encode(texts), ended, strict=True)]
        ends = self._ends(ids)[np.array(ended)]
        return Encoded(b"".join(ids), ends, ends[:0], b"", len("".join(texts).encode()))

    def rows(self, block: list[list[str]]) -> Encoded:
        """The turns of dialogues. Rows that tell a longer and longer history repeat turns: each is encoded once."""
        dialogues = [alternate(row) for row in block]
        speakers, texts = zip(*(turn for dialogue in dialogues for turn in dialogue), strict=True)
        distinct = list(dict.fromkeys(texts))
        encoded = dict(zip(distinct, self.encode(distinct), strict=True))
        ids = [encoded[text] for text in texts]
        documents = np.cumsum([len(dialogue) for dialogue in dialogues])
        return Encoded(
            b"".join(ids), documents, self._ends(ids), bytes(speakers), len("".join(texts).encode())
        )

    def _ends(self, ids: Sequence[bytes]) -> np.ndarray:
        return np.cumsum([len(data) // self.dtype.itemsize for data in ids])


_encoder: Encoder  # of this process


def _start_worker(config: Config) -> None:
    """Ctrl-C is the parent's to handle; a worker ends with its parent, even with a killed one."""
    global _encoder
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(tokenizer_for(config))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


def _encode(block: list[Any]) -> Encoded:
    return _encoder.documents(block) if isinstance(block[0], tuple) else _encoder.rows(block)


def _executor(config: Config, n_bytes: int) -> Executor:
    """Processes, or for little text a thread, which starts at once."""
    if n_bytes < 4 * BLOCK:
        return ThreadPoolExecutor(1, initializer=_start_worker, initargs=(config,))
    return ProcessPoolExecutor(
        os.cpu_count(), multiprocessing.get_context("spawn"), _start_worker, (config,)
    )

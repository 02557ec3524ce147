"""Text files to token ids on all cores, in flat memory.

`read_blocks` reads the documents (lm) or dialogues (chatlm) of files in blocks of about BLOCK
characters. `ParallelEncoder` encodes them in worker processes and keeps their order.

A document is a block between blank lines, a line or a file, as `[data] document` says. [EOS]
follows it. What separates documents is neither encoded nor counted, nor is a document of white
space. Of a dialogue only the turns are encoded.

The ids are those of each whole document or turn, with one exception: if a document longer than a
block has a word or a run of white space longer than a block, or if the tokenizer's pattern is none
of scripts.py, ids around a cut may differ.
"""

import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tokenizers

from gptchat.config import Config
from gptchat.console import RunFailed
from gptchat.data.dialogue import TextTurn
from gptchat.data.dialogue_files import read_dialogues
from gptchat.data.json_files import is_json, read_texts
from gptchat.data.reading import read_text
from gptchat.data.scripts import WORDS
from gptchat.data.splits import DocumentPiece, dialogues_of, pieces_of
from gptchat.data.tokenizer import Tokenizer
from gptchat.runtime import granted_cores

Item = TypeVar("Item")
Result = TypeVar("Result")

BLOCK = 1 << 20  # characters encoded at once, and bytes read at once
PARALLEL_BYTES = 4 * BLOCK  # less text is encoded in a thread, which starts at once
MAX_CACHED = 2_000_000  # characters of words in a worker's cache, which is then emptied
UINT16_ENTRIES = 65535  # the largest vocabulary whose ids are stored in 16 bits
SEPARATORS = {"block": r"\n(?:[^\S\n]*\n)+", "line": "\n", "file": "(?!)"}  # (?!) never matches
BLANK_START = re.compile(r"\A\s*\n")  # blank lines before a document
UP_TO_LAST_WORD = re.compile(r"(?s:.*)\S(?=\s)")  # ends where the last white space begins


def in_order(
    executor: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """`map` in an executor, in order, with at most `ahead` items under way."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(executor.submit(function, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def read_documents(path: str | Path, document: str, size: int) -> Iterator[DocumentPiece]:
    """The documents of a file, read `size` bytes at a time, as (text, whether it ends there).

    A longer document comes in several pieces, cut before white space, which no token of our
    patterns spans, or anywhere if there is none. An object of a JSON file is a document.
    """
    if is_json(path):
        yield from ((text, True) for text in read_texts(path) if not text.isspace() and text)
        return
    at_start = True  # whether the next piece begins a document
    for text, ends in _cut(read_text(path, size), re.compile(SEPARATORS[document]), size):
        if at_start:
            text = BLANK_START.sub("", text)
            if not text or text.isspace():
                continue
        yield text, ends
        at_start = ends


def _cut(texts: Iterable[str], separator: re.Pattern[str], size: int) -> Iterator[DocumentPiece]:
    """The joined texts, cut at separators, and once `size` characters are waiting."""
    rest = ""  # what follows the last separator
    for text in texts:
        if len(rest) >= size:
            match = UP_TO_LAST_WORD.match(rest)
            end = match.end() if match else len(rest)
            yield rest[:end], False
            rest = rest[end:]
        *complete, rest = separator.split(rest + text)
        for document in complete:
            yield document, True
    yield rest.rstrip("\n"), True


def in_blocks(items: Iterable[Item], length: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Lists of items with BLOCK characters or a little more, which `length` counts."""
    block: list[Item] = []
    n_characters = 0
    for item in items:
        block.append(item)
        n_characters += length(item)
        if n_characters >= BLOCK:
            yield block
            block = []
            n_characters = 0
    if block:
        yield block


def read_blocks(paths: Sequence[Path], config: Config, split: str) -> Iterator[list[Any]]:
    """Blocks of a split's documents, as pieces (lm), or of its dialogues (chatlm).

    `split` may also be an entry of train, such as train-0.
    """
    held_out = config.data.held_out
    split = split.partition("-")[0]
    if config.task == "chatlm":
        all_dialogues = chain.from_iterable(map(read_dialogues, paths))
        dialogues = dialogues_of(split, all_dialogues, held_out)
        return in_blocks(dialogues, lambda turns: sum(len(text) for _, text in turns))
    document = config.data.document
    all_pieces = chain.from_iterable(read_documents(path, document, BLOCK) for path in paths)
    pieces = pieces_of(split, all_pieces, held_out)
    return in_blocks(pieces, lambda piece: len(piece[0]))


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= UINT16_ENTRIES else "<u4")


class Encoded(NamedTuple):
    """What one block adds to the shards. Ends are counted from the beginning of the block."""

    tokens: bytes  # ids in `token_dtype`
    documents: np.ndarray  # the end of each document: in tokens (lm) or in turns (chatlm)
    turns: np.ndarray  # the end of each turn, in tokens; empty for lm
    speakers: bytes  # the speaker of each turn; empty for lm
    n_bytes: int  # UTF-8 bytes of text


class Encoder:
    """Blocks to ids.

    If the tokenizer's pattern is one of ours, each distinct word is encoded once, which gives the
    ids of the whole text several times as fast.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer)
        self.pattern = WORDS.get(tokenizer.pattern)
        self.words: dict[str, bytes] = {}  # the cache: word -> ids
        self.n_cached = 0  # characters in it

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text, as bytes of `dtype`."""
        if not self.pattern:
            return self._encode_each(texts)
        split = [self.pattern.findall(text) for text in texts]
        new_words = list(set().union(*split) - self.words.keys())
        self.words.update(zip(new_words, self._encode_each(new_words), strict=True))
        encoded = [b"".join(map(self.words.__getitem__, words)) for words in split]
        self.n_cached += sum(map(len, new_words))
        if self.n_cached > MAX_CACHED:
            self.words = {}
            self.n_cached = 0
        return encoded

    def _encode_each(self, texts: Sequence[str]) -> list[bytes]:
        return [np.array(ids, self.dtype).tobytes() for ids in self.tokenizer.encode_batch(texts)]

    def encode_documents(self, block: Sequence[DocumentPiece]) -> Encoded:
        texts = [text for text, _ in block]
        is_end = np.array([ends for _, ends in block])
        eos = np.array(self.tokenizer.eos_id, self.dtype).tobytes()
        ids = self.encode(texts)
        for i in np.flatnonzero(is_end).tolist():
            ids[i] += eos
        return Encoded(
            tokens=b"".join(ids),
            documents=self._ends(ids)[is_end],
            turns=np.array([], np.int64),
            speakers=b"",
            n_bytes=len("".join(texts).encode()),
        )

    def encode_dialogues(self, block: Sequence[list[TextTurn]]) -> Encoded:
        turns = list(chain.from_iterable(block))
        texts = [text for _, text in turns]
        # Rows with a longer and longer history repeat turns.
        distinct = list(dict.fromkeys(texts))
        ids_of = dict(zip(distinct, self.encode(distinct), strict=True))
        ids = [ids_of[text] for text in texts]
        return Encoded(
            tokens=b"".join(ids),
            documents=np.cumsum(list(map(len, block))),
            turns=self._ends(ids),
            speakers=bytes(speaker for speaker, _ in turns),
            n_bytes=len("".join(texts).encode()),
        )

    def _ends(self, ids: Sequence[bytes]) -> np.ndarray:
        """The end of each text's ids, in tokens."""
        return np.cumsum([len(data) // self.dtype.itemsize for data in ids])


class ParallelEncoder:
    """Encodes blocks of `read_blocks`. Use it as a context manager.

    It has one worker process per core, or one thread for less than PARALLEL_BYTES of text.
    """

    def __init__(self, tokenizer: Tokenizer, task: str, n_bytes: int):
        arguments = (tokenizer.json, task)
        self.n_workers = 1
        self.executor: Executor = ThreadPoolExecutor(1, "", _start_worker, arguments)
        if n_bytes < PARALLEL_BYTES:
            return
        n_cores = granted_cores()
        context = multiprocessing.get_context("spawn")
        try:
            self.executor = ProcessPoolExecutor(n_cores, context, _start_worker, arguments)
            self.n_workers = n_cores
        except OSError as error:  # no semaphores
            reason = f"{error.strerror}; so text is encoded in one process, which takes longer"
            print(f"warning: /dev/shm: {reason}", file=sys.stderr)

    def encode(self, blocks: Iterable[list[Any]]) -> Iterator[Encoded]:
        """The encoded blocks, in order. Raises RunFailed if a worker was killed."""
        try:
            yield from in_order(self.executor, _encode_in_worker, blocks, ahead=2 * self.n_workers)
        except BrokenProcessPool:
            raise RunFailed(
                "a process that encodes text was killed, as the system does when memory is short; "
                "the same command begins anew"
            ) from None

    def __enter__(self) -> "ParallelEncoder":
        return self

    def __exit__(self, *error: object) -> None:
        self.executor.shutdown()


_worker = threading.local()  # of a worker, process or thread: its `encode` encodes a block


def _start_worker(tokenizer_json: str, task: str) -> None:
    """Runs once in each worker before its first block."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
        threading.Thread(target=_end_with_parent, daemon=True).start()
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = Encoder(Tokenizer(tokenizers.Tokenizer.from_str(tokenizer_json)))
    _worker.encode = encoder.encode_dialogues if task == "chatlm" else encoder.encode_documents


def _encode_in_worker(block: list[Any]) -> Encoded:
    return _worker.encode(block)


def _end_with_parent() -> None:
    """End this process when its parent ends, even if the parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

"""Opens the files of shards, memory-mapped; shards.py says what they hold."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptchat.console import UserError
from gptchat.data import digests
from gptchat.data.dialogue import Turn

REMEDY = "run `gptchat shards --config FILE` with this run's config"


class Folder(NamedTuple):
    """A folder of files, and the content of its `meta.json`."""

    path: Path
    meta: dict[str, Any]


class _Files(NamedTuple):
    """The arrays of one split in one folder, and how much they hold."""

    tokens: list[np.ndarray]
    paths: list[str]  # of the files of tokens
    states: dict[str, digests.FileState]
    starts: np.ndarray
    turns: np.ndarray
    speakers: np.ndarray
    n_tokens: int
    n_units: int  # that the documents are counted in: tokens (lm) or turns (chatlm)


class Shards:
    """One split, memory-mapped: one folder, or the parts of the work, in their order, as one.

    `n_tokens` ids form one stream, in `documents` documents, made of `n_bytes` of text. Document i
    goes from `starts[i]` to `starts[i + 1]`: in tokens (lm) or in turns (chatlm). Turn j goes from
    token `turns[j]` to `turns[j + 1]`, and `speakers[j]` is its speaker (both empty for lm).
    `digest` stands for all of this: shards of equal digests are equal. (The same text in other
    parts, or in one, has another digest.) Of parts, `starts`, `turns` and `speakers` are copied
    into memory: 8 bytes a document, 9 a turn.

    Raises UserError, naming the file, for one that is missing, of another size, or not what was
    written; for files of tokens that is found out by `tokens`.
    """

    def __init__(self, folders: Sequence[Folder], split: str):
        self.task = folders[0].meta["task"]
        contents = [folder.meta["splits"][split] for folder in folders]
        self.n_tokens = sum(content["tokens"] for content in contents)
        self.n_bytes = sum(content["bytes"] for content in contents)
        self.documents = sum(content["documents"] for content in contents)
        names = [folder.path.name for folder in folders]
        states = {name: content["files"] for name, content in zip(names, contents, strict=True)}
        if len(folders) == 1:
            states = contents[0]["files"]
        self.digest = digests.seal(states)["digest"]
        filled = [f for f in folders if f.meta["splits"][split]["documents"] > 0]
        opened = [_open_files(folder, split) for folder in filled]
        self.files = [array for files in opened for array in files.tokens]
        self.unchecked: dict[int, tuple[str, dict[str, digests.FileState]]] = {}
        for files in opened:  # the digests of files of tokens are compared when they are used
            for path in files.paths:
                self.unchecked[len(self.unchecked)] = (path, files.states)
        self.file_starts = _offsets([len(array) for array in self.files])
        self.speakers = _joined([files.speakers for files in opened])
        token_offsets = _offsets([files.n_tokens for files in opened])
        unit_offsets = _offsets([files.n_units for files in opened])
        self.turns = _joined_ends([files.turns for files in opened], token_offsets)
        self.starts = _joined_ends([files.starts for files in opened], unit_offsets)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The ids start..stop-1 of the stream, (stop - start,); UserError for a damaged file."""
        first = bisect_right(self.file_starts, start) - 1
        last = bisect_right(self.file_starts, stop - 1) - 1
        for number in self.unchecked.keys() & set(range(first, last + 1)):
            path, states = self.unchecked[number]
            _check_content(path, self.files[number], states)
            del self.unchecked[number]
        pieces: list[np.ndarray] = []
        for number in range(first, last + 1):
            offset = self.file_starts[number]
            pieces.append(self.files[number][max(0, start - offset) : stop - offset])
        return _joined(pieces)

    def dialogue(self, number: int) -> list[Turn]:
        """The turns of a dialogue, oldest first."""
        first, last = self.starts[number : number + 2].tolist()
        bounds = self.turns[first : last + 1]
        ids = self.tokens(int(bounds[0]), int(bounds[-1])).tolist()
        offsets = (bounds - bounds[0]).tolist()  # of the turns in `ids`
        speakers = self.speakers[first:last].tolist()
        turns: list[Turn] = []
        for speaker, (begin, end) in zip(speakers, pairwise(offsets), strict=True):
            turns.append((speaker, ids[begin:end]))
        return turns

    def prompt(self, number: int, length: int) -> list[Turn]:
        """A dialogue without its response, or the first `length` tokens from a document's start."""
        if self.task == "chatlm":
            return self.dialogue(number)[:-1]
        start = int(self.starts[number])
        stop = min(start + length, self.n_tokens)
        return [(0, self.tokens(start, stop).tolist())]


def _open_files(folder: Folder, split: str) -> _Files:
    """The files of a split that has documents."""
    meta = folder.meta
    counts = meta["splits"][split]
    states = counts["files"]
    prefix = f"{folder.path}/{split}-"
    n_tokens = counts["tokens"]
    tokens, paths = [], []
    for number, start in enumerate(range(0, n_tokens, meta["shard_tokens"])):
        length = min(meta["shard_tokens"], n_tokens - start)
        paths.append(f"{prefix}{number:05d}.bin")
        tokens.append(_open_array(paths[-1], meta["dtype"], length))
    turns = np.array([], np.int64)
    speakers = np.array([], np.uint8)
    n_units = n_tokens
    if counts["turns"] > 0:
        n_units = counts["turns"]
        turns = _open_ends(f"{prefix}turns.bin", n_units, n_tokens, states)
        speakers = _open_array(f"{prefix}speakers.bin", "u1", n_units)
        _check_content(f"{prefix}speakers.bin", speakers, states)
    starts = _open_ends(f"{prefix}documents.bin", counts["documents"], n_units, states)
    return _Files(tokens, paths, states, starts, turns, speakers, n_tokens, n_units)


def _offsets(lengths: Sequence[int]) -> list[int]:
    """Where each of several arrays begins if they stand one behind the other."""
    return list(accumulate(lengths[:-1], initial=0))


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The arrays one behind the other; a single one as it is, memory-mapped."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _joined_ends(arrays: Sequence[np.ndarray], offsets: Sequence[int]) -> np.ndarray:
    """Arrays of 0 and ends as one: each but the first without its 0 and moved by its offset."""
    if len(arrays) == 1 or not len(arrays[0]):
        return arrays[0]
    moved = [ends[1:] + offset for ends, offset in zip(arrays, offsets, strict=True)]
    return np.concatenate([arrays[0][:1], *moved])


def _open_array(path: str, dtype: str, length: int) -> np.ndarray:
    """A file as a memory-mapped array. Raises UserError if it is missing or has another size."""
    expected = length * np.dtype(dtype).itemsize
    size = os.path.getsize(path) if os.path.exists(path) else 0
    if size != expected:
        raise UserError(f"{path}: found {size:,} bytes; wanted {expected:,}; {REMEDY}")
    return np.asarray(np.memmap(path, dtype, "r"))


def _open_ends(
    path: str, length: int, total: int, states: dict[str, digests.FileState]
) -> np.ndarray:
    """A file of 0 and `length` ends, the last of which is `total`.

    Raises UserError if it is missing, of another size or content, or not in order.
    """
    ends = _open_array(path, "<i8", length + 1)
    _check_content(path, ends, states)
    in_order = bool((ends[1:] >= ends[:-1]).all())
    if not in_order or ends[0] != 0 or ends[-1] != total:
        raise UserError(f"{path}: found ends that are not in order from 0 to {total:,}; {REMEDY}")
    return ends


def _check_content(path: str, array: np.ndarray, states: dict[str, digests.FileState]) -> None:
    """Raise UserError if a file is not what was written (about 1 GB is compared in a second)."""
    if digests.new_digest(array).hexdigest() != states[Path(path).name]["digest"]:
        raise UserError(f"{path}: found other content than was written; {REMEDY}")

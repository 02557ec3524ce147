"""Token ids on disk, opened memory-mapped; shard_writer.py writes them.

Each split (train, valid, test; with `weights` each entry of train by itself: train-0, train-1 and
so on) has these files in a folder of shards, all numbers little-endian:

    SPLIT-NNNNN.bin       token ids, uint16, or uint32 past 65,535 vocabulary entries; every file
                          but the last holds SHARD_TOKENS, so a document may go on in the next
    SPLIT-documents.bin   int64: 0, then where each document ends, in tokens (lm) or turns (chatlm)
    SPLIT-turns.bin       int64: 0, then where each turn ends, in tokens (chatlm)
    SPLIT-speakers.bin    uint8: each turn's speaker (chatlm)

and `meta.json`: format version, task, the tokenizer's hash, dtype, counts; size and digest of each
file; size, modification time and digest of each source file; and a digest of all this.

Invariants:
- lm: each document is followed by [EOS]. Separators between documents (line ends, blank lines) are
  neither stored nor counted.
- chatlm: only the ids of the turns are stored. Special tokens, token types and truncation are
  added by dialogue.py when a batch is made, so shards do not depend on the context length.
- Boundaries are stored, never inferred from a token.
- Shards are opened only if they fit: made by this tokenizer and in this format, from these source
  files as they are now (see digests.py), with every file of the size that the counts give and of
  the digest that it was written with. That of a file of tokens is compared when its first token is
  asked for, so that opening is instant; `verify` compares all.
"""

import json
import os
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gptchat.config import Config
from gptchat.console import UserError
from gptchat.data import digests
from gptchat.data.dialogue import Turn
from gptchat.data.encoding import token_dtype
from gptchat.data.splits import SPLITS, patterns_of
from gptchat.data.tokenizer import Tokenizer, tokenizer_for
from gptchat.files import matching_files, split_repeats

FORMAT = 2  # 1 had no digests
SHARD_TOKENS = 1 << 28  # ids in a file
REMEDY = "run `gptchat shards --config FILE` with this run's config"


def header(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The entries of `meta.json` that shards must share with the run that opens them."""
    return {
        "format": FORMAT,
        "task": config.task,
        "document": config.data.document if config.task == "lm" else "row",
        "tokenizer": tokenizer.hash,
        "dtype": token_dtype(tokenizer).str,
        "held_out": config.data.held_out,
    }


def split_patterns(config: Config) -> dict[str, tuple[str, ...]]:
    """The files of each split that the config names: train, valid, test.

    With `weights` each entry of `train` is a split of its own: train-0, train-1 and so on.
    """
    patterns: dict[str, tuple[str, ...]] = {}
    for split in SPLITS:
        named = patterns_of(config.data, split)
        if split == "train" and config.data.weights:
            patterns |= {f"train-{i}": (pattern,) for i, pattern in enumerate(named)}
        elif named:
            patterns[split] = named
    return patterns


class Shards:
    """One split, memory-mapped.

    `n_tokens` ids form one stream, in `documents` documents, made of `n_bytes` of text. Document i
    goes from `starts[i]` to `starts[i + 1]`: in tokens (lm) or in turns (chatlm). Turn j goes from
    token `turns[j]` to `turns[j + 1]`, and `speakers[j]` is its speaker (both empty for lm).
    `digest` stands for all of this: shards of equal digests are equal.

    Raises UserError, naming the file, for one that is missing, of another size, or not what was
    written; for files of tokens that is found out by `tokens`.
    """

    def __init__(self, folder: Path, split: str, meta: dict[str, Any]):
        self.task = meta["task"]
        self.shard_tokens = meta["shard_tokens"]
        counts = meta["splits"][split]
        self.n_tokens = counts["tokens"]
        self.n_bytes = counts["bytes"]
        self.documents = counts["documents"]
        self.states = states = counts["files"]
        self.digest = digests.seal(states)["digest"]
        self.prefix = prefix = f"{folder}/{split}-"
        self.files = []
        for number, start in enumerate(range(0, self.n_tokens, self.shard_tokens)):
            length = min(self.shard_tokens, self.n_tokens - start)
            self.files.append(_open_array(f"{prefix}{number:05d}.bin", meta["dtype"], length))
        self.unchecked = set(range(len(self.files)))  # whose digests have not been compared yet
        self.turns = np.array([], np.int64)
        self.speakers = np.array([], np.uint8)
        n_units = self.n_tokens  # that the documents are counted in
        if counts["turns"] > 0:
            n_units = counts["turns"]
            self.turns = _open_ends(f"{prefix}turns.bin", n_units, self.n_tokens, states)
            self.speakers = _open_array(f"{prefix}speakers.bin", "u1", n_units)
            _check_content(f"{prefix}speakers.bin", self.speakers, states)
        self.starts = _open_ends(f"{prefix}documents.bin", self.documents, n_units, states)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The ids start..stop-1 of the stream, (stop - start,); UserError for a damaged file."""
        first_file, offset = divmod(start, self.shard_tokens)
        last_file = (stop - 1) // self.shard_tokens
        for number in self.unchecked.intersection(range(first_file, last_file + 1)):
            _check_content(f"{self.prefix}{number:05d}.bin", self.files[number], self.states)
            self.unchecked.discard(number)
        if first_file == last_file:
            ids = self.files[first_file]
        else:
            ids = np.concatenate(self.files[first_file : last_file + 1])
        return ids[offset : offset + stop - start]

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


def read_meta(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of `meta.json`.

    Raises UserError if it is missing or damaged, or if task, tokenizer or format are others.
    """
    path = config.shards_dir / "meta.json"
    try:
        meta = json.loads(path.read_text())
        older = {"held_out": 0.0}  # what shards say that were made before there was the key
        found = {key: meta.get(key, older.get(key)) for key in header(config, tokenizer)}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: found no readable meta.json ({error}); {REMEDY}") from None
    for key, expected in header(config, tokenizer).items():
        if found[key] != expected:
            raise UserError(
                f"{path}: found shards of {key} {found[key]!r}; wanted {expected!r}; {REMEDY}"
            )
    if not digests.is_sealed(meta):
        raise UserError(f"{path}: found other content than was written; {REMEDY}")
    return meta


def open_shards(config: Config, split: str, tokenizer: Tokenizer) -> Shards:
    """The shards of a split.

    Raises UserError, naming the file, if they are missing, damaged or made from something else:
    another tokenizer or format, other source files, or source files that have changed since. Shards
    whose source files are all gone are opened.
    """
    patterns = split_patterns(config).get(split)
    if not patterns:
        raise UserError(f"[data] {split}: found no files named; wanted some")
    meta = read_meta(config, tokenizer)
    place = f"{config.shards_dir / 'meta.json'}: found shards of"
    sources = meta["splits"].get(split, {}).get("sources")
    matched = chain.from_iterable(matching_files(pattern) for pattern in patterns)
    distinct, _ = split_repeats(matched)
    present = {str(path) for path in distinct}
    if not sources or (present and present != sources.keys()):
        raise UserError(f"{place} other files for {split}, {', '.join(patterns)}; {REMEDY}")
    for name in sorted(present):
        if not digests.is_unchanged(name, sources[name]):
            raise UserError(f"{place} {name} as it was before it changed; {REMEDY}")
    return Shards(config.shards_dir, split, meta)


def open_sources(config: Config, split: str, tokenizer: Tokenizer) -> list[Shards]:
    """The shards of a split; with `weights` those of each entry of `train`.

    Raises UserError as `open_shards` does.
    """
    names = [split]
    if split == "train" and config.data.weights:
        names = [f"train-{i}" for i in range(len(config.data.train))]
    return [open_shards(config, name, tokenizer) for name in names]


def verify(config: Config) -> dict[str, str]:
    """Read all shards, and the source files that are there; returns what is wrong, by file.

    Raises UserError if there is no `meta.json` that fits the config.
    """
    meta = read_meta(config, tokenizer_for(config))
    wrong: dict[str, str] = {}
    for split, content in meta["splits"].items():
        problems = {}
        for name, state in content["files"].items():
            path = str(config.shards_dir / name)
            if not _has_digest(path, state):
                problems[path] = "found other content than was written, or none"
        if not problems:
            Shards(config.shards_dir, split, meta)
        for name, state in content["sources"].items():
            if os.path.isfile(name) and not _has_digest(name, state):
                problems[name] = f"has changed since {split} was made from it"
        wrong |= problems
    return wrong


def _has_digest(path: str, state: digests.FileState) -> bool:
    try:
        return digests.file_digest(path) == state["digest"]
    except OSError:  # missing, or unreadable
        return False

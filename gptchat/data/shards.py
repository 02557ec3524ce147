"""Text to token ids on disk: `gptchat shards --config FILE [section.key=value ...]`.

The text of each split (train, valid, test) is encoded once, on all cores, and then opened
memory-mapped. A folder of shards holds these files of each split, all numbers little-endian:

    SPLIT-NNNNN.bin       token ids, uint16, or uint32 past 65,535 vocabulary entries; every file
                          but the last holds SHARD_TOKENS, so a document may go on in the next
    SPLIT-documents.bin   int64: 0, then where each document ends, in tokens (lm) or turns (chatlm)
    SPLIT-turns.bin       int64: 0, then where each turn ends, in tokens (chatlm)
    SPLIT-speakers.bin    uint8: each turn's speaker (chatlm)

and `meta.json`: format version, task, the tokenizer's hash, dtype, counts, source files.

Invariants:
- lm: each document is followed by [EOS]. Separators between documents (line ends, blank lines) are
  neither stored nor counted.
- chatlm: only the ids of the turns are stored. Special tokens, token types and truncation are
  added by dialogue.py when a batch is made, so shards do not depend on the context length.
- Boundaries are stored, never inferred from a token.
- Writing is all or nothing: files are written under temporary names; then `meta.json` is removed
  first and comes back last. What stands beside a `meta.json` belongs to it.
- Shards are opened only if they fit: made by this tokenizer and in this format, from these source
  files, with every file of the size that the counts give.
- Memory is flat: text is read, encoded and written in blocks.
"""

import json
import os
from collections.abc import Sequence
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptchat.config import Config, load_config
from gptchat.console import CommandParser, Progress, UserError
from gptchat.data.dialogue import Turn
from gptchat.data.encoding import Encoded, ParallelEncoder, read_blocks, token_dtype
from gptchat.data.tokenizer import Tokenizer, tokenizer_for
from gptchat.files import atomic_write, expand

FORMAT = 1
SPLITS = ("train", "valid", "test")
SHARD_TOKENS = 1 << 28  # ids in a file
REMEDY = "run `gptchat shards --config FILE` with this run's config"


class Writer:
    """Writes the files of one split under temporary names, and counts what it writes."""

    def __init__(self, prefix: str, dtype: np.dtype):
        self.prefix = prefix  # FOLDER/SPLIT-
        self.itemsize = dtype.itemsize
        self.files: dict[str, BinaryIO] = {}
        self.counts = {"tokens": 0, "documents": 0, "turns": 0, "bytes": 0}

    def append(self, block: Encoded) -> None:
        """Write what a block adds."""
        counts = self.counts
        if block.speakers:
            self._write_ends("documents", block.documents + counts["turns"])
            self._write_ends("turns", block.turns + counts["tokens"])
            self._write("speakers", block.speakers)
        else:
            self._write_ends("documents", block.documents + counts["tokens"])
        self._write_tokens(block.tokens)
        counts["documents"] += len(block.documents)
        counts["turns"] += len(block.turns)
        counts["bytes"] += block.n_bytes

    def _write_tokens(self, tokens: bytes) -> None:
        """Write ids into the current file of tokens, and on into new ones when it is full."""
        data = memoryview(tokens)
        while data:
            number, used = divmod(self.counts["tokens"], SHARD_TOKENS)
            part = data[: (SHARD_TOKENS - used) * self.itemsize]
            self._write(f"{number:05d}", part)
            self.counts["tokens"] += len(part) // self.itemsize
            data = data[len(part) :]

    def _write_ends(self, name: str, ends: np.ndarray) -> None:
        if name not in self.files:
            self._write(name, bytes(8))  # the 0 in front
        self._write(name, ends.astype("<i8").tobytes())

    def _write(self, name: str, data: bytes | memoryview) -> None:
        if name not in self.files:
            self.files[name] = open(f"{self.prefix}{name}.bin.tmp", "wb")
        self.files[name].write(data)

    def finish(self) -> None:
        """Sync and close the files."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()


def header(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The entries of `meta.json` that shards must share with the run that opens them."""
    return {
        "format": FORMAT,
        "task": config.task,
        "document": config.data.document if config.task == "lm" else "row",
        "tokenizer": tokenizer.hash,
        "dtype": token_dtype(tokenizer).str,
    }


def write(config: Config) -> dict[str, Any]:
    """Encode the config's splits into its folder of shards; returns the content of `meta.json`.

    Raises UserError for files that are missing, hold no text, are not UTF-8 or (chatlm) have a line
    that is no dialogue, and where the folder cannot be written. The old shards then stay.
    """
    folder = config.shards_dir
    tokenizer = tokenizer_for(config)
    meta = header(config, tokenizer) | {"shard_tokens": SHARD_TOKENS, "splits": {}}
    sources: dict[str, list[Path]] = {}
    for split in SPLITS:
        patterns = getattr(config.data, split)
        if patterns:
            sources[split] = expand(patterns, f"[data] {split}")
    total = sum(sum(_sizes(paths).values()) for paths in sources.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        n_read = 0  # bytes of the files that are done
        with ParallelEncoder(config, total) as encoder, Progress(total, "shards", "B") as bar:
            for split, paths in sources.items():
                writer = Writer(f"{folder}/{split}-", token_dtype(tokenizer))
                for block in encoder.encode(read_blocks(paths, config)):
                    writer.append(block)
                    n_separators = max(len(block.documents), len(block.turns))  # a byte each
                    bar.update(block.n_bytes + n_separators)
                writer.finish()
                n_read += sum(_sizes(paths).values())
                bar.update(n_read - bar.bar.n)  # what was no text: JSON's keys, blank lines
                if writer.counts["documents"] == 0:
                    patterns = ", ".join(getattr(config.data, split))
                    raise UserError(f"{patterns}: found no text; wanted some for [data] {split}")
                meta["splits"][split] = writer.counts | {"sources": _sizes(paths)}
        _publish(folder, meta)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror}; the shards were not written"
        ) from None
    finally:
        for path in folder.glob("*.bin.tmp"):
            path.unlink()
    return meta


def _sizes(paths: Sequence[Path]) -> dict[str, int]:
    """The size of each file, in bytes."""
    return {str(path): path.stat().st_size for path in paths}


def _publish(folder: Path, meta: dict[str, Any]) -> None:
    """Replace the old files by the new ones: `meta.json` is removed first and comes back last."""
    (folder / "meta.json").unlink(missing_ok=True)
    for split in SPLITS:
        for path in folder.glob(f"{split}-*.bin"):
            path.unlink()
    for path in folder.glob("*.bin.tmp"):
        path.replace(path.with_suffix(""))
    with atomic_write(folder / "meta.json") as temporary:
        temporary.write_text(json.dumps(meta, indent=2) + "\n")


class Shards:
    """One split, memory-mapped.

    `n_tokens` ids form one stream, in `documents` documents, made of `n_bytes` of text. Document i
    goes from `starts[i]` to `starts[i + 1]`: in tokens (lm) or in turns (chatlm). Turn j goes from
    token `turns[j]` to `turns[j + 1]`, and `speakers[j]` is its speaker (both empty for lm).
    """

    def __init__(self, folder: Path, split: str, meta: dict[str, Any]):
        self.task = meta["task"]
        self.shard_tokens = meta["shard_tokens"]
        counts = meta["splits"][split]
        self.n_tokens = counts["tokens"]
        self.n_bytes = counts["bytes"]
        self.documents = counts["documents"]
        prefix = f"{folder}/{split}-"
        self.files = []
        for number, start in enumerate(range(0, self.n_tokens, self.shard_tokens)):
            length = min(self.shard_tokens, self.n_tokens - start)
            self.files.append(_open_array(f"{prefix}{number:05d}.bin", meta["dtype"], length))
        self.starts = _open_array(f"{prefix}documents.bin", "<i8", self.documents + 1)
        self.turns = np.array([], np.int64)
        self.speakers = np.array([], np.uint8)
        if counts["turns"] > 0:
            self.turns = _open_array(f"{prefix}turns.bin", "<i8", counts["turns"] + 1)
            self.speakers = _open_array(f"{prefix}speakers.bin", "u1", counts["turns"])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The ids start..stop-1 of the stream, (stop - start,)."""
        first_file, offset = divmod(start, self.shard_tokens)
        last_file = (stop - 1) // self.shard_tokens
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


def _open_array(path: str, dtype: str, length: int) -> np.ndarray:
    """A file as a memory-mapped array. Raises UserError if it is missing or has another size."""
    expected = length * np.dtype(dtype).itemsize
    size = os.path.getsize(path) if os.path.exists(path) else 0
    if size != expected:
        raise UserError(f"{path}: found {size:,} bytes; wanted {expected:,}; {REMEDY}")
    return np.asarray(np.memmap(path, dtype, "r"))


def open_shards(config: Config, split: str, tokenizer: Tokenizer) -> Shards:
    """The shards of a split.

    Raises UserError, naming the file, if they are missing, incomplete or made from something else:
    another tokenizer or format, other source files, or source files that have changed since. Shards
    whose source files are all gone are opened.
    """
    path = config.shards_dir / "meta.json"
    patterns = getattr(config.data, split)
    if not patterns:
        raise UserError(f"[data] {split}: found no files named; wanted some")
    try:
        meta = json.loads(path.read_text())
        sources = meta["splits"].get(split, {}).get("sources")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: found no readable meta.json ({error}); {REMEDY}") from None
    for key, expected in header(config, tokenizer).items():
        if meta.get(key) != expected:
            raise UserError(
                f"{path}: found shards of {key} {meta.get(key)!r}; wanted {expected!r}; {REMEDY}"
            )
    present: dict[str, int] = {}  # source file -> bytes
    for pattern in patterns:
        for name in glob(pattern, recursive=True):
            if os.path.isfile(name):
                present[str(Path(name))] = os.path.getsize(name)
    if not sources or (present and present != sources):
        raise UserError(
            f"{path}: found shards of other or changed files for {split}, {', '.join(patterns)}; "
            f"{REMEDY}"
        )
    return Shards(config.shards_dir, split, meta)


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "shards",
        "Encode the files of a config's [data] section into token ids on disk.",
        "gptchat shards --config configs/lm.toml data.shards=out/shards/try",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    for split, counts in write(config)["splits"].items():
        print(
            f"{config.shards_dir}: {split}: {counts['documents']:,} documents, "
            f"{counts['tokens']:,} tokens, {counts['bytes']:,} bytes of text"
        )

"""Text -> token ids on disk, encoded once on all cores, then opened memory-mapped.

    gptchat shards --config configs/lm.toml [section.key=value ...]

For each split (train, valid, test) a folder of shards holds, all numbers little-endian:

    SPLIT-NNNNN.bin       token ids, uint16, or uint32 past 65,535 vocabulary entries; every file but the last has
                          SHARD_TOKENS of them, so a document may go on in the next file
    SPLIT-documents.bin   int64: 0, then where each document ends: a number of tokens (lm) or of turns (chatlm)
    SPLIT-turns.bin       int64: 0, then where each turn ends, a number of tokens (chatlm)
    SPLIT-speakers.bin    uint8: each turn's speaker (chatlm)

and `meta.json`: format, tokenizer's hash, counts, bytes of text, source files. All are written under temporary names;
`meta.json` is taken away before the first is renamed and comes back last. Memory stays flat: text is read, encoded and
written in blocks, of which a few are under way at once.

lm: each document is followed by [EOS]; what separates documents (line ends, blank lines) belongs to none, is no text.
chatlm: the ids of the turns only; special tokens, types and truncation are made by dialogue.py at batch time.
"""

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptchat.config import Config, load_config
from gptchat.console import Progress, UserError
from gptchat.data.dialogue import Turn, read_rows
from gptchat.data.encoding import (
    BLOCK,
    Encoded,
    _encode,
    _executor,
    in_blocks,
    in_order,
    read_documents,
    token_dtype,
)
from gptchat.data.tokenizer import Tokenizer, tokenizer_for
from gptchat.files import atomic_write, expand

FORMAT = 1
SPLITS = ("train", "valid", "test")
AGAIN = "run `gptchat shards --config FILE` with this run's config"
SHARD_TOKENS = 1 << 28


class Writer:
    """The files of one split, under temporary names."""

    def __init__(self, prefix: str, dtype: np.dtype):
        self.prefix, self.itemsize = prefix, dtype.itemsize
        self.files: dict[str, BinaryIO] = {}
        self.counts = dict.fromkeys(("tokens", "documents", "turns", "bytes"), 0)

    def write(self, name: str, data: bytes | memoryview) -> None:
        if name not in self.files:
            self.files[name] = open(f"{self.prefix}{name}.bin.tmp", "wb")
        self.files[name].write(data)

    def append(self, block: Encoded) -> None:
        """Write what a block adds."""
        counts = self.counts
        self.write_ends(
            "documents", block.documents + counts["turns" if block.speakers else "tokens"]
        )
        if block.speakers:
            self.write_ends("turns", block.turns + counts["tokens"])
            self.write("speakers", block.speakers)
        data = memoryview(block.tokens)
        while data:
            number, used = divmod(counts["tokens"], SHARD_TOKENS)
            part = data[: (SHARD_TOKENS - used) * self.itemsize]
            self.write(f"{number:05d}", part)
            counts["tokens"] += len(part) // self.itemsize
            data = data[len(part) :]
        for key, n in (
            ("documents", len(block.documents)),
            ("turns", len(block.turns)),
            ("bytes", block.n_bytes),
        ):
            counts[key] += n

    def write_ends(self, name: str, ends: np.ndarray) -> None:
        if name not in self.files:
            self.write(name, bytes(8))
        self.write(name, ends.astype("<i8").tobytes())

    def finish(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()


def header(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """What shards must have in common with the run that reads them."""
    return {
        "format": FORMAT,
        "task": config.task,
        "document": config.data.document if config.task == "lm" else "row",
        "tokenizer": tokenizer.hash,
        "dtype": token_dtype(tokenizer).str,
    }


def write(config: Config) -> dict[str, Any]:
    """Encode the config's splits into its folder of shards; returns what is in `meta.json`.

    Raises UserError for files that are missing, hold no text, are not UTF-8 or (chatlm) no rows of dialogues.
    """
    folder, tokenizer = config.shards_dir, tokenizer_for(config)
    meta = header(config, tokenizer) | {"shard_tokens": SHARD_TOKENS, "splits": {}}
    named = {split: getattr(config.data, split) for split in SPLITS if getattr(config.data, split)}
    paths = {split: expand(patterns, f"[data] {split}") for split, patterns in named.items()}
    total = sum(path.stat().st_size for found in paths.values() for path in found)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _executor(config, total) as executor, Progress(total, "shards", "B") as bar:
            for split, found in paths.items():
                writer = Writer(f"{folder}/{split}-", token_dtype(tokenizer))
                for encoded in in_order(
                    executor, _encode, _blocks(found, config), 2 * (os.cpu_count() or 1)
                ):
                    writer.append(encoded)
                    bar.update(encoded.n_bytes + max(len(encoded.documents), len(encoded.turns)))
                writer.finish()
                if not writer.counts["documents"]:
                    raise UserError(
                        f"{', '.join(named[split])}: found no text; wanted some for [data] {split}"
                    )
                meta["splits"][split] = writer.counts | {
                    "sources": {str(path): path.stat().st_size for path in found}
                }
        _publish(folder, meta)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror}; the shards were not written"
        ) from None
    finally:
        for path in folder.glob("*.bin.tmp"):
            path.unlink()
    return meta


def _blocks(paths: Iterable[Path], config: Config) -> Iterator[list[Any]]:
    if config.task == "chatlm":
        return in_blocks(
            (row for path in paths for row in read_rows(path)), lambda row: sum(map(len, row))
        )
    pieces = (
        piece for path in paths for piece in read_documents(path, config.data.document, BLOCK)
    )
    return in_blocks(pieces, lambda piece: len(piece[0]))


def _publish(folder: Path, meta: dict[str, Any]) -> None:
    """Replace the old files by the new ones."""
    (folder / "meta.json").unlink(missing_ok=True)
    for split in SPLITS:
        for path in folder.glob(f"{split}-*.bin"):
            path.unlink()
    for path in folder.glob("*.bin.tmp"):
        path.replace(path.with_suffix(""))
    with atomic_write(folder / "meta.json") as temporary:
        temporary.write_text(json.dumps(meta, indent=2) + "\n")


class Shards:
    """One split, memory-mapped: `n_tokens` ids in one stream, `n_bytes` of text, `documents` documents. Document i goes
    from `starts[i]` to `starts[i + 1]`; so do turns, by `turns`."""

    def __init__(self, folder: Path, split: str, meta: dict[str, Any]):
        counts = meta["splits"][split]
        self.task, self.shard_tokens = meta["task"], meta["shard_tokens"]
        self.n_tokens, self.n_bytes, self.documents = (
            counts["tokens"],
            counts["bytes"],
            counts["documents"],
        )
        prefix, turns = f"{folder}/{split}-", counts["turns"]
        self.files = [
            _open(
                f"{prefix}{i:05d}.bin", meta["dtype"], min(self.shard_tokens, self.n_tokens - start)
            )
            for i, start in enumerate(range(0, self.n_tokens, self.shard_tokens))
        ]
        self.starts = _open(f"{prefix}documents.bin", "<i8", self.documents + 1)
        self.turns = _open(f"{prefix}turns.bin", "<i8", turns + 1) if turns else self.starts[:0]
        self.speakers = _open(f"{prefix}speakers.bin", "u1", turns) if turns else self.starts[:0]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The ids start..stop-1 of the stream."""
        first, offset = divmod(start, self.shard_tokens)
        parts = self.files[first : -(-stop // self.shard_tokens)]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts))[
            offset : offset + stop - start
        ]

    def dialogue(self, number: int) -> list[Turn]:
        """The turns of a dialogue."""
        first, last = self.starts[number : number + 2].tolist()
        bounds = self.turns[first : last + 1].tolist()
        ids = self.tokens(bounds[0], bounds[-1]).tolist()
        return [
            (speaker, ids[start - bounds[0] : stop - bounds[0]])
            for speaker, start, stop in zip(
                self.speakers[first:last].tolist(), bounds, bounds[1:], strict=False
            )
        ]


def _open(path: str, dtype: str, n: int) -> np.ndarray:
    found, wanted = (
        os.path.getsize(path) if os.path.exists(path) else 0,
        n * np.dtype(dtype).itemsize,
    )
    if found != wanted:
        raise UserError(f"{path}: found {found:,} bytes; wanted {wanted:,}; {AGAIN}")
    return np.asarray(np.memmap(path, dtype, "r"))


def open_shards(config: Config, split: str, tokenizer: Tokenizer) -> Shards:
    """The shards of a split. Raises UserError, naming the file, if they are missing, incomplete or made from something
    else: another tokenizer or format, other source files or changed ones (where those are still there)."""
    path, patterns = config.shards_dir / "meta.json", getattr(config.data, split)
    if not patterns:
        raise UserError(f"[data] {split}: found no files named; wanted some")
    try:
        meta = json.loads(path.read_text())
        different = {
            key: wanted
            for key, wanted in header(config, tokenizer).items()
            if meta.get(key) != wanted
        }
        sources = meta["splits"].get(split, {}).get("sources")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: found no readable meta.json ({error}); {AGAIN}") from None
    for key, wanted in different.items():
        raise UserError(
            f"{path}: found shards of {key} {meta.get(key)!r}; wanted {wanted!r}; {AGAIN}"
        )
    now = {
        str(Path(name)): os.path.getsize(name)
        for pattern in patterns
        for name in glob(pattern, recursive=True)
        if os.path.isfile(name)
    }
    if not sources or (now and now != sources):
        raise UserError(
            f"{path}: found shards of other or changed files for {split}, {', '.join(patterns)}; {AGAIN}"
        )
    return Shards(config.shards_dir, split, meta)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="gptchat shards", description="Encode a config's data into shards."
    )
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    for split, counts in write(config)["splits"].items():
        print(
            f"{config.shards_dir}: {split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
            f"{counts['bytes']:,} bytes of text"
        )

"""Text to token ids on disk: `gptchat shards [--part 3/16] --config FILE [section.key=value ...]`.

The text of each split is encoded once, on all cores, into the files that shards.py describes. With
`--part 3/16` only that part of the text (parts.py) is, into a folder of its own within, on any
machine; a part that was killed is done again alone.

Invariants:
- Writing is all or nothing: files are written under temporary names; then `meta.json` is removed
  first and comes back last. What stands beside a `meta.json` belongs to it.
- One process at a time writes a folder, or a part; it holds the lock of that folder. Writers of
  parts also share that of the folder around them, where none writes whole shards then.
- Memory is flat: text is read, encoded and written in blocks.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptchat.config import Config, load_run_config
from gptchat.console import CommandParser, Progress, UserError
from gptchat.data import digests
from gptchat.data.encoding import Encoded, ParallelEncoder, read_blocks, token_dtype
from gptchat.data.parts import Part, parse_part, parts_in, sources_of
from gptchat.data.reading import Source, Span, text_size
from gptchat.data.shards import (
    REMEDY,
    SHARD_TOKENS,
    header,
    verify,
)
from gptchat.data.splits import SPLITS, empty_splits, split_patterns
from gptchat.data.tokenizer import Tokenizer, tokenizer_for
from gptchat.files import atomic_write, expand, lock_folder


class Writer:
    """Writes the files of one split under temporary names, and counts what it writes."""

    def __init__(self, prefix: str, dtype: np.dtype):
        self.prefix = prefix  # FOLDER/SPLIT-
        self.itemsize = dtype.itemsize
        self.files: dict[str, BinaryIO] = {}
        self.digests: dict[str, Any] = {}
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
            self.digests[name] = digests.new_digest()
        self.files[name].write(data)
        self.digests[name].update(data)

    def finish(self) -> dict[str, digests.FileState]:
        """Sync and close the files; returns size and digest of each by its name."""
        states: dict[str, digests.FileState] = {}
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            digest = self.digests[name].hexdigest()
            file_name = Path(f"{self.prefix}{name}.bin").name
            states[file_name] = {"bytes": file.tell(), "digest": digest}
            file.close()
        return states


def write(config: Config, only: str = "", part: Part | None = None) -> dict[str, Any]:
    """Encode the config's splits into its folder of shards; returns the content of `meta.json`.

    `only` names the one split that is wanted, "" all of them. With `part` only that part of them is
    encoded, into its own folder. Raises UserError for files that are missing, hold no text, are not
    UTF-8 or (chatlm) have a line that is no dialogue, where the folder cannot be written or holds
    other parts, and while another process writes there. The old shards then stay.
    """
    tokenizer = tokenizer_for(config)
    paths: dict[str, list[Path]] = {}
    for split, patterns in split_patterns(config.data).items():
        if only in ("", split):
            paths[split] = expand(patterns, f"[data] {split}")
    sources: dict[str, list[Source]] = {split: [*listed] for split, listed in paths.items()}
    meta = header(config, tokenizer) | {"shard_tokens": SHARD_TOKENS}
    if part:
        sources = {split: sources_of(paths[split], part, config) for split in paths}
        sizes = {split: {str(path): text_size(path) for path in paths[split]} for split in paths}
        meta |= {"part": list(part), "text": sizes}
    with _locked(config.shards_dir, part) as folder:
        _remove_leftovers(folder)  # of a run that was killed
        try:
            meta["splits"] = _encode(config, tokenizer, sources, folder)
            if not part:
                _check_filled(config, meta["splits"])
            _publish(folder, digests.seal(meta))
        except OSError as error:
            raise UserError(
                f"{error.filename or folder}: {error.strerror}; the shards were not written"
            ) from None
        finally:
            _remove_leftovers(folder)
    return meta


@contextmanager
def _locked(folder: Path, part: Part | None) -> Iterator[Path]:
    """Hold a folder of shards, or share it and hold that of a part; yields what is written to."""
    busy = "another process is writing shards here"
    with lock_folder(folder, busy, shared=part is not None):
        _check_kind(folder, part)
        if not part:
            yield folder
            return
        with lock_folder(folder / part.folder, busy):
            yield folder / part.folder


def _check_kind(folder: Path, part: Part | None) -> None:
    """Raise UserError if a folder holds whole shards where a part is to be, or the reverse."""
    if part and (folder / "meta.json").exists():
        found = "whole shards"
    else:
        others = [p for p in parts_in(folder) if not part or p.total != part.total]
        if not others:
            return
        found = others[0].folder
    wanted = f"parts of {part.total}" if part else "no parts"
    raise UserError(
        f"{folder}: found {found}; wanted {wanted} there: remove it, or name another data.shards"
    )


def _check_filled(config: Config, splits: dict[str, dict[str, Any]]) -> None:
    documents = {split: counts["documents"] for split, counts in splits.items()}
    for problem in empty_splits(config.data, documents):
        raise UserError(problem)


def _encode(
    config: Config, tokenizer: Tokenizer, sources: dict[str, list[Source]], folder: Path
) -> dict[str, dict[str, Any]]:
    """Write each split's files under temporary names; returns what `meta.json` says of each."""
    total = sum(_n_bytes(source) for listed in sources.values() for source in listed)
    n_read = 0  # bytes of the files that are done
    splits: dict[str, dict[str, Any]] = {}
    with ParallelEncoder(config, total) as encoder, Progress(total, "shards", "B") as bar:
        for split, listed in sources.items():
            states = {str(source): digests.source_state(Path(source)) for source in listed}
            n_read += sum(map(_n_bytes, listed))
            writer = Writer(f"{folder}/{split}-", token_dtype(tokenizer))
            for block in encoder.encode(read_blocks(listed, config, split)):
                writer.append(block)
                n_separators = max(len(block.documents), len(block.turns))  # a byte each
                bar.update(block.n_bytes + n_separators)
            files = writer.finish()
            bar.update(n_read - bar.bar.n)  # what was no text: JSON's keys, blank lines
            splits[split] = writer.counts | {"files": files, "sources": states}
    return splits


def _n_bytes(source: Source) -> int:
    """Bytes of text that are read."""
    return source.stop - source.start if isinstance(source, Span) else text_size(Path(source))


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files; only the process that holds the folder's lock may do so."""
    for pattern in ("*.bin.tmp", ".meta.json.*.tmp"):
        for path in folder.glob(pattern):
            path.unlink()


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


def _report_verification(config: Config) -> None:
    """Print a line for each file that is not as it should be; UserError if there is one."""
    wrong = verify(config)
    for name, problem in wrong.items():
        print(f"{name}: {problem}", file=sys.stderr)
    if wrong:
        raise UserError(f"{config.shards_dir}: damaged or out of date; {REMEDY}")
    print(f"{config.shards_dir}: OK")


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "shards",
        "Encode the files of a config's [data] section into token ids on disk.",
        "gptchat shards --config configs/lm.toml data.shards=out/shards/try",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="TOML file")
    verify_help = "write nothing; compare all files with the digests taken when they were written"
    parser.add_argument("--verify", action="store_true", help=verify_help)
    part_help = "write one of several parts of the work, which are opened as one"
    parser.add_argument("--part", metavar="3/16", help=part_help)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    config = load_run_config(arguments.config, arguments.overrides)
    if arguments.verify:
        _report_verification(config)
        return
    part = parse_part(arguments.part) if arguments.part else None
    folder = config.shards_dir / part.folder if part else config.shards_dir
    for split, counts in write(config, part=part)["splits"].items():
        print(
            f"{folder}: {split}: {counts['documents']:,} documents, "
            f"{counts['tokens']:,} tokens, {counts['bytes']:,} bytes of text"
        )

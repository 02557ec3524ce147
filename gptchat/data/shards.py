"""Token ids on disk: `gptchat shards --config FILE [section.key=value ...]`.

`write` encodes each split (train, valid, test; with `weights` each entry of train by itself:
train-0, train-1 and so on) into files of the folder `data.shards`, all numbers little-endian:

    SPLIT-NNNNN.bin       token ids, uint16, or uint32 past 65,535 vocabulary entries; every file
                          but the last holds SHARD_TOKENS, so a document may go on in the next
    SPLIT-documents.bin   int64: 0, then where each document ends, in tokens (lm) or turns (chatlm)
    SPLIT-turns.bin       int64: 0, then where each turn ends, in tokens (chatlm)
    SPLIT-speakers.bin    uint8: each turn's speaker (chatlm)

`manifest.json` (artifacts.py) says what they were made from, with a size and digest for each file.

Invariants:
- lm: each document is followed by [EOS]. Separators between documents (line ends, blank lines) are
  neither stored nor counted.
- chatlm: only the ids of the turns are stored. Special tokens, token types and truncation are
  added by dialogue.py when a batch is made, so shards do not depend on the context length.
- Boundaries are stored, never inferred from a token.
- Writing is all or nothing: files are written under temporary names; then the manifest is removed
  first and comes back last. One process at a time writes a folder.
- Memory is flat: text is read, encoded and written in blocks; files are opened memory-mapped.
- Shards are opened only if this tokenizer made them, in this format, from the source files as they
  are now (or from files that are all gone), and if every file has the size and digest that it was
  written with. A file of token ids is compared when its first id is read, so that opening is
  instant; `--verify` reads all of them.
"""

import copy
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptchat.artifacts import (
    MANIFEST,
    FileState,
    changed_input,
    changed_setting,
    input_states,
    json_digest,
    lock_folder,
    new_digest,
    read_manifest,
    write_manifest,
)
from gptchat.config import Config, load_run_config
from gptchat.console import CommandParser, Progress, UserError
from gptchat.data.corpora import write_missing
from gptchat.data.dialogue import Turn
from gptchat.data.encoding import Encoded, ParallelEncoder, read_blocks, token_dtype
from gptchat.data.reading import text_size
from gptchat.data.splits import SPLITS, describe_empty, split_patterns
from gptchat.data.tokenizer import Tokenizer, prepare_vocabulary, tokenizer_for
from gptchat.files import expand, matching_files, remove_temporary_files

SHARD_FORMAT = 3  # 1 had no digests, 2 no counts of each held-out file
SHARD_TOKENS = 1 << 28  # ids in a file
REMEDY = "run `gptchat shards --config FILE` with this run's config"


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
            self.digests[name] = new_digest()
        self.files[name].write(data)
        self.digests[name].update(data)

    def finish(self) -> dict[str, FileState]:
        """Sync and close the files; returns size and digest of each by its name."""
        states: dict[str, FileState] = {}
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            digest = self.digests[name].hexdigest()
            file_name = Path(f"{self.prefix}{name}.bin").name
            states[file_name] = {"bytes": file.tell(), "digest": digest}
            file.close()
        return states


def settings_of(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """What shards and the run that opens them must share."""
    return {
        "format": SHARD_FORMAT,
        "task": config.task,
        "document": config.data.document if config.task == "lm" else "row",
        "tokenizer": tokenizer.hash,
        "dtype": token_dtype(tokenizer).str,
        "held_out": config.data.held_out,
    }


def write(config: Config, only: str = "") -> dict[str, Any]:
    """Encode the config's splits into its folder of shards; returns the manifest.

    `only` names the one split that is wanted, "" all of them. Raises UserError for files that are
    missing, hold no text, are not UTF-8 or (chatlm) have a line that is no dialogue, where the
    folder cannot be written, and while another process writes there. The old shards then stay.
    """
    tokenizer = tokenizer_for(config)
    folder = config.shards_dir
    sources: dict[str, list[Path]] = {}
    for split, patterns in split_patterns(config.data).items():
        if only in ("", split):
            sources[split] = expand(patterns, f"[data] {split}")
    manifest: dict[str, Any] = {
        "settings": settings_of(config, tokenizer),
        "shard_tokens": SHARD_TOKENS,
    }
    with lock_folder(folder, "another process is writing shards here"):
        _remove_leftovers(folder)  # of a process that was killed
        try:
            manifest["splits"] = _encode(config, tokenizer, sources)
            _publish(folder, manifest)
        except OSError as error:
            place = error.filename or folder
            raise UserError(f"{place}: {error.strerror}; the shards were not written") from None
        finally:
            _remove_leftovers(folder)
    return manifest


def _encode(
    config: Config, tokenizer: Tokenizer, sources: dict[str, list[Path]]
) -> dict[str, dict[str, Any]]:
    """Write each split's files under temporary names; returns what the manifest says of each."""
    total = sum(text_size(path) for paths in sources.values() for path in paths)
    n_done = 0  # bytes of the files that have been read
    splits: dict[str, dict[str, Any]] = {}
    encoder = ParallelEncoder(tokenizer, config.task, total)
    with encoder, Progress(total, "shards", "B") as bar:
        for split, paths in sources.items():
            inputs = input_states(paths)
            writer = Writer(f"{config.shards_dir}/{split}-", token_dtype(tokenizer))
            counts_of: dict[str, dict[str, int]] = {}
            for group in _groups(config, split, paths):
                before = writer.counts.copy()
                for block in encoder.encode(read_blocks(group, config, split)):
                    writer.append(block)
                    n_separators = max(len(block.documents), len(block.turns))  # a byte each
                    bar.update(block.n_bytes + n_separators)
                n_done += sum(map(text_size, group))
                bar.update(n_done - bar.bar.n)  # what was no text: JSON's keys, blank lines
                counts_of[str(group[0])] = {
                    key: count - before[key] for key, count in writer.counts.items()
                }
            if writer.counts["documents"] == 0:
                patterns = split_patterns(config.data)[split]
                raise UserError(describe_empty(patterns, split, config.data.held_out))
            splits[split] = writer.counts | {
                "files": writer.finish(),
                "inputs": inputs,
                "counts_of": counts_of,
            }
    return splits


def _groups(config: Config, split: str, paths: list[Path]) -> list[list[Path]]:
    """The source files that are counted together: each by itself where they are evaluated so."""
    if split in ("valid", "test") and config.data.held_out == 0:
        return [[path] for path in paths]
    return [paths]


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files; only the process that holds the folder's lock may do so."""
    for path in folder.glob("*.bin.tmp"):
        path.unlink()
    remove_temporary_files(folder)


def _publish(folder: Path, manifest: dict[str, Any]) -> None:
    """Replace the old files by the new ones: the manifest is removed first and comes back last."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for split in SPLITS:
        for path in folder.glob(f"{split}-*.bin"):
            path.unlink()
    for path in folder.glob("*.bin.tmp"):
        path.replace(path.with_suffix(""))
    write_manifest(folder, manifest)


class Shards:
    """One split, memory-mapped.

    `n_tokens` ids form one stream, in `documents` documents, made of `n_bytes` of text. Document i
    goes from `starts[i]` to `starts[i + 1]`: in tokens (lm) or in turns (chatlm). Turn j goes from
    token `turns[j]` to `turns[j + 1]`, and `speakers[j]` is its speaker (both empty for lm).
    `digest` stands for the content of the whole split: shards of equal digests are equal.

    Raises UserError, naming the file, for one that is missing, of another size, or not what was
    written; for files of tokens that is found out by `tokens`.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], split: str):
        self.folder = folder
        self.split = split
        self.task = manifest["settings"]["task"]
        content = manifest["splits"][split]
        self.counts_of: dict[str, dict[str, int]] = content["counts_of"]
        self.n_tokens: int = content["tokens"]
        self.n_bytes: int = content["bytes"]
        self.documents: int = content["documents"]
        self.states: dict[str, FileState] = content["files"]
        self.digest = json_digest(self.states)
        dtype, size = manifest["settings"]["dtype"], manifest["shard_tokens"]
        self.file_starts = list(range(0, self.n_tokens, size))
        self.files = [
            self._open(f"{number:05d}", dtype, min(size, self.n_tokens - start))
            for number, start in enumerate(self.file_starts)
        ]
        self.unchecked = set(range(len(self.files)))
        self.offset = 0  # of token 0 in the files
        self.turns = np.array([], np.int64)
        self.speakers = np.array([], np.uint8)
        n_units = self.n_tokens
        if self.task == "chatlm":
            n_units = content["turns"]
            self.turns = self._open_ends("turns", n_units, self.n_tokens)
            self.speakers = self._open("speakers", "u1", n_units)
            self._check("speakers", self.speakers)
        self.starts = self._open_ends("documents", self.documents, n_units)

    def _open(self, name: str, dtype: str, length: int) -> np.ndarray:
        """A file as an array. Raises UserError if it is missing or has another size."""
        path = self._path(name)
        expected = length * np.dtype(dtype).itemsize
        size = os.path.getsize(path) if path.exists() else 0
        if size != expected:
            raise UserError(f"{path}: found {size:,} bytes; wanted {expected:,}; {REMEDY}")
        return np.asarray(np.memmap(path, dtype, "r"))

    def _open_ends(self, name: str, length: int, total: int) -> np.ndarray:
        """A file of 0 and `length` ends, the last of which is `total`, in order."""
        ends = self._open(name, "<i8", length + 1)
        self._check(name, ends)
        in_order = bool((ends[1:] >= ends[:-1]).all())
        if not in_order or ends[0] != 0 or ends[-1] != total:
            problem = f"found ends that are not in order from 0 to {total:,}"
            raise UserError(f"{self._path(name)}: {problem}; {REMEDY}")
        return ends

    def _check(self, name: str, array: np.ndarray) -> None:
        """Raise UserError if a file is not what was written (about 1 GB is read in a second)."""
        path = self._path(name)
        if new_digest(array).hexdigest() != self.states[path.name]["digest"]:
            raise UserError(f"{path}: found other content than was written; {REMEDY}")

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.split}-{name}.bin"

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The ids start..stop-1 of the stream, (stop - start,); UserError for a damaged file."""
        start += self.offset
        stop += self.offset
        first = bisect_right(self.file_starts, start) - 1
        last = bisect_right(self.file_starts, stop - 1) - 1
        pieces: list[np.ndarray] = []
        for number in range(first, last + 1):
            if number in self.unchecked:
                self._check(f"{number:05d}", self.files[number])
                self.unchecked.remove(number)
            offset = self.file_starts[number]
            pieces.append(self.files[number][max(0, start - offset) : stop - offset])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

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

    def by_source(self) -> dict[str, "Shards"]:
        """For valid and test, the documents of each source file as shards of their own.

        With `held_out`, and for train, all files together are one source, named by the first.
        """
        sources: dict[str, Shards] = {}
        first = 0  # document
        for name, counts in self.counts_of.items():
            sources[name] = self._section(first, counts)
            first += counts["documents"]
        return sources

    def _section(self, first: int, counts: dict[str, int]) -> "Shards":
        """The documents from number `first` on that have these counts."""
        section = copy.copy(self)
        section.n_tokens = counts["tokens"]
        section.n_bytes = counts["bytes"]
        section.documents = counts["documents"]
        starts = self.starts[first : first + section.documents + 1]
        section.starts = starts - starts[0]
        section.offset = int(starts[0])
        if self.task == "chatlm":
            turns = self.turns[starts[0] : starts[-1] + 1]
            section.turns = turns - turns[0]
            section.speakers = self.speakers[starts[0] : starts[-1]]
            section.offset = int(turns[0])
        return section


def why_outdated(config: Config, tokenizer: Tokenizer, splits: Sequence[str] = ()) -> str:
    """Why the folder does not hold these splits as they would be written now; "" if it does.

    No `splits` stands for all. Splits whose source files are all gone are not out of date.
    """
    manifest = read_manifest(config.shards_dir)
    if manifest is None or "splits" not in manifest:
        return f"no readable {MANIFEST}"
    reason = changed_setting(manifest["settings"], settings_of(config, tokenizer))
    patterns = split_patterns(config.data)
    for split in splits or patterns:
        if reason:
            break
        if split not in manifest["splits"] or split not in patterns:
            return f"no shards of {split}"
        reason = changed_input(manifest["splits"][split]["inputs"], matching_files(patterns[split]))
    return reason


def open_shards(config: Config, split: str, tokenizer: Tokenizer) -> Shards:
    """The shards of a split.

    Raises UserError, naming the file, if they are missing, damaged, or out of date.
    """
    if split not in split_patterns(config.data):
        raise UserError(f"[data] {split}: found no files named; wanted some")
    reason = why_outdated(config, tokenizer, [split])
    manifest = read_manifest(config.shards_dir)
    if reason or manifest is None:
        raise UserError(f"{config.shards_dir}: {reason}; {REMEDY}")
    return Shards(config.shards_dir, manifest, split)


def open_sources(config: Config, split: str, tokenizer: Tokenizer) -> list[Shards]:
    """The shards of a split; with `weights` those of each entry of `train`.

    Raises UserError as `open_shards` does.
    """
    names = [split]
    if split == "train" and config.data.weights:
        names = [f"train-{i}" for i in range(len(config.data.train))]
    return [open_shards(config, name, tokenizer) for name in names]


def prepare(config: Config) -> bool:
    """Write the shards if any split is missing or out of date. Returns whether they were written.

    Default corpora and a vocabulary that they need are made first. Raises UserError as `write`.
    """
    write_missing(chain.from_iterable(split_patterns(config.data).values()))
    prepare_vocabulary(config)
    if not why_outdated(config, tokenizer_for(config)):
        return False
    for split, counts in write(config)["splits"].items():
        print(
            f"{config.shards_dir}: {split}: {counts['documents']:,} documents, "
            f"{counts['tokens']:,} tokens, {counts['bytes']:,} bytes of text"
        )
    return True


def verify(config: Config) -> None:
    """Read all shards. Raises UserError for a damaged file."""
    tokenizer = tokenizer_for(config)
    for split in split_patterns(config.data):
        shards = open_shards(config, split, tokenizer)
        for start in shards.file_starts:
            shards.tokens(start, start + 1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "shards",
        "Encode the files of a config's [data] section into token ids on disk.",
        "gptchat shards --config configs/lm.toml data.shards=out/shards/try",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="TOML file")
    verify_help = "write nothing; compare all files with the digests taken when they were written"
    parser.add_argument("--verify", action="store_true", help=verify_help)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    config = load_run_config(arguments.config, arguments.overrides)
    if arguments.verify:
        verify(config)
        print(f"{config.shards_dir}: OK")
    elif not prepare(config):
        print(f"{config.shards_dir}: kept as it is; text and vocabulary are those it was made from")

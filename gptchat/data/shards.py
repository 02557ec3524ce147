"""Token ids on disk: `gptchat shards --config FILE [section.key=value ...]`.

Each split (train or, with `weights`, train-0, train-1 and so on; valid; test) has files in the
folder `data.shards`, all numbers little-endian:

    SPLIT-00000.bin       token ids, uint16, or uint32 for a vocabulary of more than 65,535 entries
    SPLIT-documents.bin   int64: 0, then the end of each document, in tokens (lm) or turns (chatlm)
    SPLIT-turns.bin       int64: 0, then the end of each turn, in tokens (chatlm)
    SPLIT-speakers.bin    uint8: the speaker of each turn (chatlm)

`manifest.json` (artifacts.py) records what they were made from, and the size and digest of each
file (`b2sum -l 128`). An [EOS] follows each document of an lm. Of dialogues only the ids of the
turns are stored: dialogue.py adds special tokens and types and truncates when a batch is made, so
shards do not depend on the context length.

Writing is all or nothing: the manifest is removed before the new files get their names, and written
after that. Shards are opened only if this tokenizer made them from the source files as they are
now, or from files that are all gone, and if every file has its size and digest.
"""

import copy
import os
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

SHARD_FORMAT = 3
REMEDY = "run `gptchat shards --config FILE` with this run's config"


class Writer:
    """Writes the files of one split under temporary names."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype):
        self.folder = folder
        self.split = split
        self.itemsize = dtype.itemsize
        self.files: dict[str, BinaryIO] = {}
        self.digests: dict[str, Any] = {}
        self.counts = {"tokens": 0, "documents": 0, "turns": 0, "bytes": 0}

    def append(self, block: Encoded) -> None:
        counts = self.counts
        if block.speakers:
            self._write_ends("documents", block.documents + counts["turns"])
            self._write_ends("turns", block.turns + counts["tokens"])
            self._write("speakers", block.speakers)
        else:
            self._write_ends("documents", block.documents + counts["tokens"])
        self._write("00000", block.tokens)
        counts["tokens"] += len(block.tokens) // self.itemsize
        counts["documents"] += len(block.documents)
        counts["turns"] += len(block.turns)
        counts["bytes"] += block.n_bytes

    def _write_ends(self, name: str, ends: np.ndarray) -> None:
        if name not in self.files:
            self._write(name, bytes(8))  # the 0 in front
        self._write(name, ends.astype("<i8").tobytes())

    def _write(self, name: str, data: bytes) -> None:
        if name not in self.files:
            self.files[name] = open(self.folder / f"{self.split}-{name}.bin.tmp", "wb")
            self.digests[name] = new_digest()
        self.files[name].write(data)
        self.digests[name].update(data)

    def finish(self) -> dict[str, FileState]:
        """Sync and close the files; returns the size and digest of each."""
        states: dict[str, FileState] = {}
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            digest = self.digests[name].hexdigest()
            states[f"{self.split}-{name}.bin"] = {"bytes": file.tell(), "digest": digest}
            file.close()
        return states


def settings_of(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """What shards have in common with a run that opens them."""
    return {
        "format": SHARD_FORMAT,
        "task": config.task,
        "document": config.data.document if config.task == "lm" else "row",
        "tokenizer": tokenizer.hash,
        "dtype": token_dtype(tokenizer).str,
        "held_out": config.data.held_out,
    }


def write(config: Config, only: str = "") -> dict[str, Any]:
    """Encode all splits of the config, or only one, into its folder; returns the manifest.

    Raises UserError for text that is missing, empty or of another task, for a folder that cannot
    be written, and while another process writes there. The old shards then stay.
    """
    tokenizer = tokenizer_for(config)
    folder = config.shards_dir
    sources: dict[str, list[Path]] = {}
    for split, patterns in split_patterns(config.data).items():
        if only in ("", split):
            sources[split] = expand(patterns, f"[data] {split}")
    manifest: dict[str, Any] = {"settings": settings_of(config, tokenizer)}
    with lock_folder(folder, "another process is writing shards here"):
        try:
            manifest["splits"] = _encode(config, tokenizer, sources)
            _publish(folder, manifest)
        except OSError as error:
            place = error.filename or folder
            raise UserError(f"{place}: {error.strerror}; the shards were not written") from None
        finally:
            for path in folder.glob("*.bin.tmp"):  # also those of a process that was killed
                path.unlink()
            remove_temporary_files(folder)
    return manifest


def _encode(
    config: Config, tokenizer: Tokenizer, sources: dict[str, list[Path]]
) -> dict[str, dict[str, Any]]:
    """Write the files under temporary names; returns the manifest's `splits`."""
    total = sum(text_size(path) for paths in sources.values() for path in paths)
    splits: dict[str, dict[str, Any]] = {}
    encoder = ParallelEncoder(tokenizer, config.task, total)
    with encoder, Progress(total, "shards", "B") as bar:
        for split, paths in sources.items():
            inputs = input_states(paths)
            writer = Writer(config.shards_dir, split, token_dtype(tokenizer))
            counts_of: dict[str, dict[str, int]] = {}
            is_evaluated_by_file = split in ("valid", "test") and config.data.held_out == 0
            for group in [[path] for path in paths] if is_evaluated_by_file else [paths]:
                before = writer.counts.copy()
                for block in encoder.encode(read_blocks(group, config, split)):
                    writer.append(block)
                    bar.update(block.n_bytes)
                counts = {key: count - before[key] for key, count in writer.counts.items()}
                counts_of[str(group[0])] = counts
                bar.update(sum(map(text_size, group)) - counts["bytes"])  # what is not stored
            if writer.counts["documents"] == 0:
                patterns = split_patterns(config.data)[split]
                raise UserError(describe_empty(patterns, split, config.data.held_out))
            files = writer.finish()
            splits[split] = writer.counts | {
                "files": files,
                "inputs": inputs,
                "counts_of": counts_of,
            }
    return splits


def _publish(folder: Path, manifest: dict[str, Any]) -> None:
    """Replace the old files by the new ones."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for split in SPLITS:
        for path in folder.glob(f"{split}-*.bin"):
            path.unlink()
    for content in manifest["splits"].values():
        for name in content["files"]:
            (folder / f"{name}.tmp").replace(folder / name)
    write_manifest(folder, manifest)


class Shards:
    """One split, memory-mapped.

    `n_tokens` ids form one stream, in `documents` documents, made of `n_bytes` of text. Document i
    goes from `starts[i]` to `starts[i + 1]`: in tokens (lm) or in turns (chatlm). Turn j goes from
    token `turns[j]` to `turns[j + 1]`, and `speakers[j]` is its speaker (both empty for lm).
    Shards of equal `digest` are equal.

    Raises UserError for a file that is missing or is not what was written. All are read for that,
    about 1 GB a second.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], split: str):
        self.task = manifest["settings"]["task"]
        content = manifest["splits"][split]
        self.counts_of: dict[str, dict[str, int]] = content["counts_of"]
        self.n_tokens: int = content["tokens"]
        self.n_bytes: int = content["bytes"]
        self.documents: int = content["documents"]
        self.digest = json_digest(content["files"])

        def open_file(name: str, dtype: str, length: int) -> np.ndarray:
            file_name = f"{split}-{name}.bin"
            digest = content["files"][file_name]["digest"]
            return _open_file(folder / file_name, dtype, length, digest)

        self.ids = open_file("00000", manifest["settings"]["dtype"], self.n_tokens)
        self.starts = open_file("documents", "<i8", self.documents + 1)
        self.turns = np.array([], np.int64)
        self.speakers = np.array([], np.uint8)
        if self.task == "chatlm":
            self.turns = open_file("turns", "<i8", content["turns"] + 1)
            self.speakers = open_file("speakers", "u1", content["turns"])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]

    def dialogue(self, number: int) -> list[Turn]:
        """The turns of a dialogue, oldest first."""
        first, last = self.starts[number : number + 2].tolist()
        bounds = self.turns[first : last + 1].tolist()
        speakers = self.speakers[first:last].tolist()
        turns: list[Turn] = []
        for speaker, (start, stop) in zip(speakers, pairwise(bounds), strict=True):
            turns.append((speaker, self.ids[start:stop].tolist()))
        return turns

    def by_source(self) -> dict[str, "Shards"]:
        """The documents of each file of valid and test as shards of their own.

        With `held_out`, and for train, all files together are one source, named by the first.
        """
        sources: dict[str, Shards] = {}
        first = 0  # document
        for name, counts in self.counts_of.items():
            sources[name] = self._section(first, counts)
            first += counts["documents"]
        return sources

    def _section(self, first: int, counts: dict[str, int]) -> "Shards":
        """Shards of the documents from number `first` on that have these counts."""
        section = copy.copy(self)
        section.n_tokens = counts["tokens"]
        section.n_bytes = counts["bytes"]
        section.documents = counts["documents"]
        starts = self.starts[first : first + section.documents + 1]
        section.starts = starts - starts[0]
        first_token = int(starts[0])
        if self.task == "chatlm":
            turns = self.turns[starts[0] : starts[-1] + 1]
            section.turns = turns - turns[0]
            section.speakers = self.speakers[starts[0] : starts[-1]]
            first_token = int(turns[0])
        section.ids = self.ids[first_token : first_token + section.n_tokens]
        return section


def _open_file(path: Path, dtype: str, length: int, digest: str) -> np.ndarray:
    expected = length * np.dtype(dtype).itemsize
    size = path.stat().st_size if path.exists() else 0
    if size != expected:
        raise UserError(f"{path}: found {size:,} bytes; wanted {expected:,}; {REMEDY}")
    array = np.asarray(np.memmap(path, dtype, "r"))
    if new_digest(array).hexdigest() != digest:
        raise UserError(f"{path}: found other content than was written; {REMEDY}")
    return array


def why_outdated(config: Config, tokenizer: Tokenizer, splits: Sequence[str] = ()) -> str:
    """Why the folder does not hold these splits, or all, as they would be written now, or "".

    A split whose source files are all gone is not out of date.
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
    """The shards of a split. Raises UserError if they are missing, damaged or out of date."""
    if split not in split_patterns(config.data):
        raise UserError(f"[data] {split}: found no files named; wanted some")
    reason = why_outdated(config, tokenizer, [split])
    manifest = read_manifest(config.shards_dir)
    if reason or manifest is None:
        raise UserError(f"{config.shards_dir}: {reason}; {REMEDY}")
    return Shards(config.shards_dir, manifest, split)


def open_sources(config: Config, split: str, tokenizer: Tokenizer) -> list[Shards]:
    """The shards of a split; with `weights` those of each entry of `train`."""
    names = [split]
    if split == "train" and config.data.weights:
        names = [f"train-{i}" for i in range(len(config.data.train))]
    return [open_shards(config, name, tokenizer) for name in names]


def prepare(config: Config) -> bool:
    """Write the shards if any split is missing or out of date. Returns whether they were written.

    Default corpora and a vocabulary that they need are made first.
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "shards",
        "Encode the files of a config's [data] section into token ids on disk.",
        "gptchat shards --config configs/lm.toml data.shards=out/shards/try",
    )
    arguments = parser.parse_config_and_overrides(argv)
    config = load_run_config(arguments.config, arguments.overrides)
    if not prepare(config):
        print(f"{config.shards_dir}: kept as it is; text and vocabulary are those it was made from")

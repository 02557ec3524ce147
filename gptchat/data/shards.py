"""Text to token ids on disk: `gptchat shards [--verify] --config FILE [section.key=value ...]`.

The text of each split (train, valid, test) is encoded once, on all cores, and then opened
memory-mapped. A folder of shards holds these files of each split, all numbers little-endian:

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
- Writing is all or nothing: files are written under temporary names; then `meta.json` is removed
  first and comes back last. What stands beside a `meta.json` belongs to it.
- Shards are opened only if they fit: made by this tokenizer and in this format, from these source
  files as they are now (see digests.py), with every file of the size that the counts give and,
  files of tokens excepted, of the digest that it was written with.
- Files of tokens are too large to be read at every start; `--verify` compares their digests.
- One process at a time writes a folder; it holds the folder's lock.
- Memory is flat: text is read, encoded and written in blocks.
"""

import json
import os
import sys
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptchat.config import Config
from gptchat.console import CommandParser, Progress, UserError
from gptchat.data import digests
from gptchat.data.check import check, verdict
from gptchat.data.dialogue import Turn
from gptchat.data.encoding import Encoded, ParallelEncoder, read_blocks, token_dtype
from gptchat.data.reading import text_size
from gptchat.data.splits import SPLITS, describe_empty, load_run_config, patterns_of
from gptchat.data.tokenizer import Tokenizer, tokenizer_for
from gptchat.files import atomic_write, expand, lock_folder, matching_files, split_repeats

FORMAT = 2  # 1 had no digests
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


def write(config: Config, splits_wanted: Sequence[str] = SPLITS) -> dict[str, Any]:
    """Encode these of the config's splits into its folder of shards; returns `meta.json`'s content.

    Raises UserError for files that are missing, hold no text, are not UTF-8 or (chatlm) have a line
    that is no dialogue, where the folder cannot be written, and while another process writes there.
    The old shards then stay.
    """
    folder = config.shards_dir
    tokenizer = tokenizer_for(config)
    sources: dict[str, list[Path]] = {}
    for split in splits_wanted:
        patterns = patterns_of(config.data, split)
        if patterns:
            sources[split] = expand(patterns, f"[data] {split}")
    with lock_folder(folder, "another process is writing shards here"):
        _remove_leftovers(folder)  # of a run that was killed
        try:
            splits = _encode(config, tokenizer, sources)
            meta = header(config, tokenizer) | {"shard_tokens": SHARD_TOKENS, "splits": splits}
            _publish(folder, digests.seal(meta))
        except OSError as error:
            raise UserError(
                f"{error.filename or folder}: {error.strerror}; the shards were not written"
            ) from None
        finally:
            _remove_leftovers(folder)
    return meta


def _encode(
    config: Config, tokenizer: Tokenizer, sources: dict[str, list[Path]]
) -> dict[str, dict[str, Any]]:
    """Write each split's files under temporary names; returns what `meta.json` says of each."""
    total = sum(text_size(path) for paths in sources.values() for path in paths)
    n_read = 0  # bytes of the files that are done
    splits: dict[str, dict[str, Any]] = {}
    with ParallelEncoder(config, total) as encoder, Progress(total, "shards", "B") as bar:
        for split, paths in sources.items():
            states = {str(path): digests.source_state(path) for path in paths}
            n_read += sum(map(text_size, paths))
            writer = Writer(f"{config.shards_dir}/{split}-", token_dtype(tokenizer))
            for block in encoder.encode(read_blocks(paths, config, split)):
                writer.append(block)
                n_separators = max(len(block.documents), len(block.turns))  # a byte each
                bar.update(block.n_bytes + n_separators)
            files = writer.finish()
            bar.update(n_read - bar.bar.n)  # what was no text: JSON's keys, blank lines
            if writer.counts["documents"] == 0:
                raise UserError(describe_empty(config.data, split))
            splits[split] = writer.counts | {"files": files, "sources": states}
    return splits


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


class Shards:
    """One split, memory-mapped.

    `n_tokens` ids form one stream, in `documents` documents, made of `n_bytes` of text. Document i
    goes from `starts[i]` to `starts[i + 1]`: in tokens (lm) or in turns (chatlm). Turn j goes from
    token `turns[j]` to `turns[j + 1]`, and `speakers[j]` is its speaker (both empty for lm).
    `digest` stands for all of this: shards of equal digests are equal.

    Raises UserError, naming the file, for one that is missing, of another size, or (files of tokens
    excepted) not what was written.
    """

    def __init__(self, folder: Path, split: str, meta: dict[str, Any]):
        self.task = meta["task"]
        self.shard_tokens = meta["shard_tokens"]
        counts = meta["splits"][split]
        self.n_tokens = counts["tokens"]
        self.n_bytes = counts["bytes"]
        self.documents = counts["documents"]
        states = counts["files"]
        self.digest = digests.seal(states)["digest"]
        prefix = f"{folder}/{split}-"
        self.files = []
        for number, start in enumerate(range(0, self.n_tokens, self.shard_tokens)):
            length = min(self.shard_tokens, self.n_tokens - start)
            self.files.append(_open_array(f"{prefix}{number:05d}.bin", meta["dtype"], length))
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
    patterns = patterns_of(config.data, split)
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
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    config = load_run_config(arguments.config, arguments.overrides)
    if arguments.verify:
        _report_verification(config)
        return
    for split, counts in write(config)["splits"].items():
        print(
            f"{config.shards_dir}: {split}: {counts['documents']:,} documents, "
            f"{counts['tokens']:,} tokens, {counts['bytes']:,} bytes of text"
        )
    print(f"{config.shards_dir}: {verdict(check(config))}")

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

The files may also stand in folders `part-00003-of-00016`, one for each part of the text (parts.py),
each with a `meta.json` of its own. This one also has the part's number, and all text files with
their sizes; digests only of those that the part was made from. Parts are opened as one stream, with
the ids that a single run writes.

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
- A folder holds either whole shards or parts of one total number. Parts are opened only if all are
  there and were made from the same files by the same settings.
"""

import json
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from gptchat.config import Config
from gptchat.console import UserError
from gptchat.data import digests
from gptchat.data.encoding import token_dtype
from gptchat.data.parts import Part, parts_in
from gptchat.data.shard_files import REMEDY, Folder, Shards
from gptchat.data.splits import describe_empty, split_patterns
from gptchat.data.tokenizer import Tokenizer, tokenizer_for
from gptchat.files import matching_files, split_repeats

SHARD_FORMAT = 2  # 1 had no digests
SHARD_TOKENS = 1 << 28  # ids in a file


def header(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The entries of `meta.json` that shards must share with the run that opens them."""
    return {
        "format": SHARD_FORMAT,
        "task": config.task,
        "document": config.data.document if config.task == "lm" else "row",
        "tokenizer": tokenizer.hash,
        "dtype": token_dtype(tokenizer).str,
        "held_out": config.data.held_out,
    }


def read_folders(config: Config, tokenizer: Tokenizer) -> list[Folder]:
    """The folder of shards, or those of all its parts, in their order.

    Raises UserError if one is missing or damaged, if task, tokenizer or format are others, or if
    parts were made from different files.
    """
    folder = config.shards_dir
    parts = parts_in(folder)
    if not parts or (folder / "meta.json").exists():
        return [Folder(folder, _read_meta(folder, config, tokenizer, REMEDY))]
    total = parts[0].total
    folders = []
    for number in range(1, total + 1):
        part = Part(number, total)
        remedy = (
            f"run `gptchat shards --part {number}/{total} --config FILE` with this run's config"
        )
        meta = _read_meta(folder / part.folder, config, tokenizer, remedy)
        folders.append(Folder(folder / part.folder, meta))
        same = [meta.get(key) for key in ("text", "shard_tokens")]
        first = [folders[0].meta.get(key) for key in ("text", "shard_tokens")]
        if meta.get("part") != list(part) or same != first:
            raise UserError(
                f"{folder / part.folder}: found a part of other files than {folders[0].path.name}; "
                f"wanted part {number} of the same; {remedy}"
            )
    return folders


def _read_meta(folder: Path, config: Config, tokenizer: Tokenizer, remedy: str) -> dict[str, Any]:
    """The content of a `meta.json`; `remedy` ends the line of the UserErrors of `read_folders`."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text())
        older = {"held_out": 0.0}  # what shards say that were made before there was the key
        found = {key: meta.get(key, older.get(key)) for key in header(config, tokenizer)}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: found no readable meta.json ({error}); {remedy}") from None
    for key, expected in header(config, tokenizer).items():
        if found[key] != expected:
            raise UserError(
                f"{path}: found shards of {key} {found[key]!r}; wanted {expected!r}; {remedy}"
            )
    if not digests.is_sealed(meta):
        raise UserError(f"{path}: found other content than was written; {remedy}")
    return meta


def open_shards(config: Config, split: str, tokenizer: Tokenizer) -> Shards:
    """The shards of a split.

    Raises UserError, naming the file, if they are missing, damaged or made from something else:
    another tokenizer or format, other source files, or source files that have changed since. Shards
    whose source files are all gone are opened.
    """
    patterns = split_patterns(config.data).get(split)
    if not patterns:
        raise UserError(f"[data] {split}: found no files named; wanted some")
    folders = read_folders(config, tokenizer)
    place = f"{config.shards_dir / 'meta.json'}: found shards of"
    sources = _sources(folders, split)
    matched = chain.from_iterable(matching_files(pattern) for pattern in patterns)
    distinct, _ = split_repeats(matched)
    present = {str(path) for path in distinct}
    if not sources or (present and present != sources.keys()):
        raise UserError(f"{place} other files for {split}, {', '.join(patterns)}; {REMEDY}")
    for name in sorted(present):
        if not digests.is_unchanged(name, sources[name]):
            raise UserError(f"{place} {name} as it was before it changed; {REMEDY}")
    if not _has_documents(folders, split):
        raise UserError(describe_empty(patterns, split, config.data.held_out))
    return Shards(folders, split)


def _has_documents(folders: Sequence[Folder], split: str) -> bool:
    """Whether a split has a document in any of the parts; of whole shards each split has."""
    return any(folder.meta["splits"][split]["documents"] for folder in folders)


def _sources(folders: Sequence[Folder], split: str) -> dict[str, digests.FileState]:
    """The state of each source file. Raises UserError where parts have read it in two states."""
    sources: dict[str, digests.FileState] = {}
    for folder in folders:
        for name, state in folder.meta["splits"].get(split, {}).get("sources", {}).items():
            known = sources.setdefault(name, state)
            if known["digest"] != state["digest"]:
                raise UserError(
                    f"{folder.path}: found a part of {name} as it was before or after it changed; "
                    "wanted all parts of one file as it was at one time"
                )
    return sources


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
    wrong: dict[str, str] = {}
    folders = read_folders(config, tokenizer_for(config))
    for split in folders[0].meta["splits"]:
        problems = {}
        for folder in folders:
            for name, state in folder.meta["splits"][split]["files"].items():
                if not _has_digest(str(folder.path / name), state):
                    problem = "found other content than was written, or none"
                    problems[str(folder.path / name)] = problem
        if not problems and _has_documents(folders, split):
            Shards(folders, split)
        for name, state in _sources(folders, split).items():
            if os.path.isfile(name) and not _has_digest(name, state):
                problems[name] = f"has changed since {split} was made from it"
        wrong |= problems
    return wrong


def _has_digest(path: str, state: digests.FileState) -> bool:
    try:
        return digests.file_digest(path) == state["digest"]
    except OSError:  # missing, or unreadable
        return False

"""Text to token ids on disk: `gptchat shards [--part 3/16] --config FILE [section.key=value ...]`.

The text of each split (train, valid, test) is encoded once, on all cores, and then opened
memory-mapped. A folder of shards holds these files of each split, all numbers little-endian:

    SPLIT-NNNNN.bin       token ids, uint16, or uint32 past 65,535 vocabulary entries; every file
                          but the last holds SHARD_TOKENS, so a document may go on in the next
    SPLIT-documents.bin   int64: 0, then where each document ends, in tokens (lm) or turns (chatlm)
    SPLIT-turns.bin       int64: 0, then where each turn ends, in tokens (chatlm)
    SPLIT-speakers.bin    uint8: each turn's speaker (chatlm)

and `meta.json`: format version, task, the tokenizer's hash, dtype, counts; size and digest of each
file; size, modification time and digest of each source file; and a digest of all this.

With `--part 3/16` only that part of the text (parts.py) is encoded, into files of the same kind in
the folder `part-00003-of-00016` within, by a process of its own, on any machine. When all parts
stand there they are opened as one stream, with the ids that a single run writes. Its `meta.json`
also has its number, and all text files with their sizes; it has digests only of those that it read.

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
- One process at a time writes a folder, or a part; it holds the lock of that folder.
- A folder holds either whole shards or parts of one total number. Parts are opened only if all are
  there and were made from the same files by the same settings.
- Memory is flat: text is read, encoded and written in blocks.
"""

import json
import os
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from gptchat.config import Config
from gptchat.console import CommandParser, Progress, UserError
from gptchat.data import digests
from gptchat.data.check import check, verdict
from gptchat.data.encoding import ParallelEncoder, read_blocks, token_dtype
from gptchat.data.parts import Part, parse_part, sources_of
from gptchat.data.reading import Source, Span, text_size
from gptchat.data.shard_files import REMEDY, Folder, Shards
from gptchat.data.shard_writer import Writer
from gptchat.data.splits import SPLITS, describe_empty, load_run_config, patterns_of
from gptchat.data.tokenizer import Tokenizer, tokenizer_for
from gptchat.files import atomic_write, expand, lock_folder, matching_files, split_repeats

FORMAT = 2  # 1 had no digests
SHARD_TOKENS = 1 << 28  # ids in a file


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


def write(
    config: Config, splits_wanted: Sequence[str] = SPLITS, part: Part | None = None
) -> dict[str, Any]:
    """Encode these of the config's splits into its folder of shards; returns `meta.json`'s content.

    With `part` only that part of them is encoded, into its own folder. Raises UserError for files
    that are missing, hold no text, are not UTF-8 or (chatlm) have a line that is no dialogue, where
    the folder cannot be written or holds other parts, and while another process writes there. The
    old shards then stay.
    """
    _check_kind(config.shards_dir, part)
    folder = config.shards_dir / part.folder if part else config.shards_dir
    tokenizer = tokenizer_for(config)
    paths: dict[str, list[Path]] = {}
    for split in splits_wanted:
        patterns = patterns_of(config.data, split)
        if patterns:
            paths[split] = expand(patterns, f"[data] {split}")
    sources: dict[str, list[Source]] = {split: [*listed] for split, listed in paths.items()}
    meta = header(config, tokenizer) | {"shard_tokens": SHARD_TOKENS}
    if part:
        sources = {split: sources_of(paths[split], part, config) for split in paths}
        sizes = {split: {str(path): text_size(path) for path in paths[split]} for split in paths}
        meta |= {"part": list(part), "text": sizes}
    with lock_folder(folder, "another process is writing shards here"):
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


def _check_kind(folder: Path, part: Part | None) -> None:
    """Raise UserError if a folder holds whole shards where a part is to be, or the reverse."""
    if part and (folder / "meta.json").exists():
        found = "whole shards"
    else:
        others = [name for name in _part_folders(folder) if not part or not _is_of(name, part)]
        if not others:
            return
        found = others[0]
    wanted = f"parts of {part.total}" if part else "no parts"
    raise UserError(
        f"{folder}: found {found}; wanted {wanted} there: remove it, or name another data.shards"
    )


def _part_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("part-*-of-*"))


def _is_of(name: str, part: Part) -> bool:
    """Whether a part's folder is one of `part.total`."""
    return name.endswith(part.folder.partition("-of-")[2])


def _check_filled(config: Config, splits: dict[str, dict[str, Any]]) -> None:
    for split, counts in splits.items():
        if counts["documents"] == 0:
            raise UserError(describe_empty(config.data, split))


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
            writer = Writer(f"{folder}/{split}-", token_dtype(tokenizer), SHARD_TOKENS)
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


def read_folders(config: Config, tokenizer: Tokenizer) -> list[Folder]:
    """The folder of shards, or those of all its parts, in their order.

    Raises UserError if one is missing or damaged, if task, tokenizer or format are others, or if
    parts were made from different files.
    """
    folder = config.shards_dir
    parts = _part_folders(folder)
    if not parts or (folder / "meta.json").exists():
        return [Folder(folder, _read_meta(folder, config, tokenizer, REMEDY))]
    total = int(parts[0].rpartition("-")[2])
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
    patterns = patterns_of(config.data, split)
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
    if not any(folder.meta["splits"][split]["documents"] for folder in folders):
        raise UserError(describe_empty(config.data, split))
    return Shards(folders, split)


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
        if not problems:
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
    written = write(config, part=part)
    for split, counts in written["splits"].items():
        print(
            f"{config.shards_dir}: {split}: {counts['documents']:,} documents, "
            f"{counts['tokens']:,} tokens, {counts['bytes']:,} bytes of text"
        )
    if part:
        print(f"{config.shards_dir / part.folder}: written")
    else:
        print(f"{config.shards_dir}: {verdict(check(config))}")

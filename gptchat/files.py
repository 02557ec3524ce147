"""Files: those that ship with gptchat, those that match a pattern, and atomic writes."""

import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from gptchat.console import UserError

PACKAGE = Path(__file__).resolve().parent


def shipped(folder: str) -> Path:
    """The folder `handlers` or `configs` of this version of gptchat.

    A checkout has it beside the package, a wheel inside, as `_handlers` or `_configs`.
    """
    inside = PACKAGE / f"_{folder}"
    return inside if inside.is_dir() else PACKAGE.with_name(folder)


def expand(patterns: Iterable[str], named_by: str) -> list[Path]:
    """The files that the glob patterns match, pattern by pattern, sorted within each.

    Further names of a file and files that gptchat wrote are left out, as a line on stderr says.
    Raises UserError for a pattern that matches no other file. `named_by` is where the patterns come
    from.
    """
    paths: list[Path] = []
    for pattern in patterns:
        own, written = _match(pattern)
        if not own:
            raise UserError(f"{pattern}: {_why_no_file(pattern, written)}, named by {named_by}")
        if written:
            print(
                f"{named_by}: gptchat wrote {len(written)} files that match {pattern}, such as "
                f"{written[0]}; they are left out",
                file=sys.stderr,
            )
        paths += own
    distinct = _distinct(paths)
    if len(distinct) < len(paths):
        print(
            f"warning: {named_by}: {len(paths)} names of {len(distinct)} files; "
            "each file is read once",
            file=sys.stderr,
        )
    return distinct


def matching_files(patterns: Iterable[str]) -> list[Path]:
    """The files that `expand` returns, without lines and errors."""
    return _distinct(path for pattern in patterns for path in _match(pattern)[0])


def _match(pattern: str) -> tuple[list[Path], list[Path]]:
    """(the files that a pattern names, files that it matches but gptchat wrote), each sorted.

    A name without wildcards always counts, and so does a pattern that begins with out/.
    """
    names = sorted(name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
    paths = [Path(name) for name in names]
    if not glob.has_magic(pattern):
        return paths, []
    is_in_out = Path(pattern).parts[0] == "out"
    is_written: dict[Path, bool] = {}  # by folder
    own: list[Path] = []
    written: list[Path] = []
    for path in paths:
        folder = path.parent
        if folder not in is_written:
            in_out = path.parts[0] == "out" and not is_in_out
            is_written[folder] = in_out or any(map(_holds_record, (folder, *folder.parents)))
        is_prompts = path.name == "prompts.tsv" and any(folder.glob("*lm.toml"))
        (written if is_written[folder] or is_prompts else own).append(path)
    return own, written


def _holds_record(folder: Path) -> bool:
    """Whether a folder is one of the vocabularies, shards or runs that gptchat wrote."""
    if (folder / "checkpoint.safetensors").exists():
        return True
    try:
        record = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"settings", "digest"} <= record.keys()  # not another's


def _why_no_file(pattern: str, written: list[Path]) -> str:
    if written:
        return "matches only files that gptchat wrote, which are left out"
    if os.path.isdir(pattern):
        return f"is a folder, wanted files such as {pattern.rstrip('/')}/*.txt"
    if os.path.lexists(pattern):
        if glob.has_magic(pattern):
            return f"is read as a pattern, wanted {glob.escape(pattern)} for the file of this name"
        return "is no regular file"
    if pattern.startswith("data/"):
        return "no such file (`gptchat corpora` writes the default ones)"
    return "no such file"


def _distinct(paths: Iterable[Path]) -> list[Path]:
    """Each file once, under its first name."""
    files: dict[tuple[int, int], Path] = {}
    for path in paths:
        files.setdefault(file_id(path), path)
    return list(files.values())


def file_id(path: Path) -> tuple[int, int]:
    """What all names of a file have in common: (device, inode)."""
    status = path.stat()
    return status.st_dev, status.st_ino


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; the file written there replaces `path` in the end.

    File and folder are synced, so after a crash there is the old file or the new one, and perhaps a
    temporary file for `remove_temporary_files`. Raises UserError if the file cannot be written.
    After any exception the old file is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # some writers make files that only their owner can read
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
        _sync(path.parent, os.O_RDONLY)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be written: {error}; what was there before is kept"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_temporary_files(folder: Path) -> None:
    """Remove what killed `atomic_write`s left in a folder in which no other process writes now."""
    for path in folder.glob(".*.[0-9]*.tmp"):
        path.unlink()


def _umask() -> int:
    """The process's file mode mask, which can be read only by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path, flags: int) -> None:
    """Wait until the disk has a file, or the entries of a folder."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

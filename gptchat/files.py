"""Files: those that ship with gptchat, those that match a pattern, and atomic writes.

After `atomic_write` a reader, or the next start after a crash, finds the old file or the new one,
never a part. A process that is killed while it writes leaves a temporary file, which
`remove_temporary_files` removes.
"""

import glob
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from safetensors import SafetensorError

from gptchat.console import UserError

PACKAGE = Path(__file__).resolve().parent


def shipped(folder: str) -> Path:
    """The folder `handlers` or `configs` of this version of gptchat.

    A checkout has it beside the package; a wheel inside, as `_handlers` or `_configs`, since a name
    like `handlers` among all installed packages could be another's.
    """
    inside = PACKAGE / f"_{folder}"
    return inside if inside.is_dir() else PACKAGE.with_name(folder)


def expand(patterns: Iterable[str], named_by: str) -> list[Path]:
    """The files that the glob patterns match, pattern by pattern, sorted within each.

    A file that comes again, by another pattern or a link, is left out, and so is one that gptchat
    wrote; a line on stderr says so. Raises UserError for a pattern that matches no file, with the
    reason; `named_by` says in it where the pattern comes from.
    """
    paths: list[Path] = []
    written: list[Path] = []
    for pattern in patterns:
        own, by_gptchat = _match(pattern)
        if not own:
            raise UserError(f"{pattern}: {why_no_file(pattern)}, named by {named_by}")
        paths += own
        written += by_gptchat
    if written:
        print(
            f"{named_by}: gptchat wrote {len(written)} files that match, such as {written[0]}; "
            "they are left out",
            file=sys.stderr,
        )
    distinct, repeated = split_repeats(paths)
    if repeated:
        print(
            f"warning: {named_by}: {repeated[0]} was named before, by this name or another; "
            f"each file is read once, so {len(repeated)} of {len(paths)} names are passed over",
            file=sys.stderr,
        )
    return distinct


def matching_files(patterns: Iterable[str]) -> list[Path]:
    """The files that `expand` returns, without lines and errors."""
    return split_repeats(chain.from_iterable(_match(pattern)[0] for pattern in patterns))[0]


def _match(pattern: str) -> tuple[list[Path], list[Path]]:
    """(the files that a pattern names, files that it matches but gptchat wrote), each sorted.

    A name without wildcards always counts.
    """
    names = sorted(name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
    paths = [Path(name) for name in names]
    if not glob.has_magic(pattern):
        return paths, []
    is_in_out = pattern.removeprefix("./").startswith("out/")
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


def split_repeats(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """(each file under its first name, further names of the same files)."""
    distinct: list[Path] = []
    repeated: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for path in paths:
        file = file_id(path)
        if file in seen:
            repeated.append(path)
        else:
            seen.add(file)
            distinct.append(path)
    return distinct, repeated


def file_id(path: Path) -> tuple[int, int]:
    """What all names of a file have in common: (device, inode)."""
    status = path.stat()
    return status.st_dev, status.st_ino


def why_no_file(pattern: str) -> str:
    """Why a glob pattern matches no regular file."""
    if pattern.startswith("~"):
        return "`~` is no home folder here, wanted its whole path"
    if _match(pattern)[1]:
        return "matches only files that gptchat wrote, which are left out"
    matched = glob.glob(pattern, recursive=True)
    is_read_as_pattern = glob.escape(pattern) != pattern
    if not matched and is_read_as_pattern and os.path.lexists(pattern):
        return f"is read as a pattern, wanted {glob.escape(pattern)} for the file of this name"
    name = matched[0] if matched else pattern
    try:
        mode = os.stat(name).st_mode
    except FileNotFoundError:
        if os.path.lexists(name):
            return f"{name} is a link to nothing"
        if name.startswith("data/"):
            return "no such file (`gptchat corpora` writes the default ones)"
        return "no such file"
    except OSError as error:  # a loop of links, a folder that may not be entered
        return f"{name} cannot be read ({error.strerror})"
    if stat.S_ISDIR(mode):
        return f"{name} is a folder, wanted files such as {name.rstrip('/')}/*.txt"
    return f"{name} is a pipe or a device, wanted a regular file"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; the file written there replaces `path` in the end.

    File and folder are synced, so that not even a crash of the machine leaves part of a file.
    Raises UserError when the disk is full or the folder read-only. After any exception the old file
    is still there.
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
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            with suppress(OSError):
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

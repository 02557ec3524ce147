"""Files: the ones that glob patterns name, and atomic writes.

`atomic_write` promises that a reader, or the next start after a crash, finds the old file or the
new one, never a part. A process that is killed while it writes leaves a temporary file, which
`remove_temporary_files` removes.
"""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from gptchat.console import UserError


def expand(patterns: Iterable[str], named_by: str) -> list[Path]:
    """The files that the glob patterns match, pattern by pattern, sorted within each.

    Raises UserError for a pattern that matches no file; `named_by` says in it where the pattern
    comes from.
    """
    paths: list[Path] = []
    for pattern in patterns:
        names = [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
        if not names:
            raise UserError(
                f"{pattern}: no such file, named by {named_by}; "
                "`make corpora` writes the default ones"
            )
        paths += [Path(name) for name in sorted(names)]
    return paths


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

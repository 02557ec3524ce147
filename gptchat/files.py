"""Files: the ones that glob patterns name, and atomic writes."""

import glob
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from gptchat.console import UserError


def expand(patterns: Iterable[str], what: str) -> list[Path]:
    """The files that the glob patterns name, in order. Raises UserError for a pattern that matches none."""
    paths: list[Path] = []
    for pattern in patterns:
        found = sorted(name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
        if not found:
            raise UserError(
                f"{pattern}: no such file, named by {what}; `make corpora` writes the default ones"
            )
        paths += [Path(name) for name in found]
    return paths


def _umask() -> int:
    os.umask(umask := os.umask(0))
    return umask


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there replaces `path` at the end, all of it or nothing.

    File and folder are synced, so that a crash leaves the old file or the new one. Raises UserError when the disk is
    full or the folder read-only; the old file then stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # some writers make private files
        for name, flags in ((temporary, os.O_RDWR), (path.parent, os.O_RDONLY)):
            descriptor = os.open(name, flags)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if name == temporary:
                os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be written: {error}; what was there before is kept"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)

"""The record of what gptchat made in a folder, `manifest.json`, and the folder's lock.

A vocabulary, shards and the results of an evaluation each have a record. It is a JSON object:

    settings   what it was made with
    inputs     size, modification time and digest of each file that it was made from
    digest     of the whole record; a record that does not fit its digest counts as missing

and whatever else its maker notes.

Files are compared by size and modification time, and by digest (BLAKE2b, 16 bytes) if only the time
differs. An edit that keeps the size and restores the time is not noticed.
"""

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import IO, Any

from gptchat.console import UserError
from gptchat.files import atomic_write

MANIFEST = "manifest.json"
NO_LOCKS = (ENOLCK, ENOSYS, EOPNOTSUPP)  # what a file system without locks answers
FileState = dict[str, Any]  # "bytes" and "digest"; of an input "mtime_ns", too


def new_digest(data: Any = b"") -> "hashlib.blake2b":
    """The digest of `data` (bytes or an array), to which `update` adds more."""
    return hashlib.blake2b(data, digest_size=16)


def file_digest(path: str | Path) -> str:
    """The digest of a file (about 1 GB a second). Raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, new_digest).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def json_digest(content: Any) -> str:
    return new_digest(json.dumps(content, sort_keys=True).encode()).hexdigest()


def input_states(paths: Iterable[Path]) -> dict[str, FileState]:
    """The state of each file, to be taken before it is used: so an edit in between is noticed.

    Raises UserError for a file that cannot be read.
    """
    states: dict[str, FileState] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: cannot be read: there is no such file")
        status = path.stat()
        states[str(path)] = {
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "digest": file_digest(path),  # after size and time
        }
    return states


def is_unchanged(path: str | Path, state: FileState) -> bool:
    """Whether a file is what it was; it is read only if its time differs."""
    status = os.stat(path)
    if status.st_size != state["bytes"]:
        return False
    return status.st_mtime_ns == state["mtime_ns"] or file_digest(path) == state["digest"]


def changed_input(states: dict[str, FileState], paths: Iterable[Path]) -> str:
    """How `paths` differ from the recorded files, in words; "" if they do not.

    No paths at all is no change: what was made from files may be used without them.
    """
    names = [str(path) for path in paths]
    for name in names:
        if name not in states:
            return f"{name} is new"
        if not is_unchanged(name, states[name]):
            return f"{name} has changed"
    gone = sorted(states.keys() - set(names))
    return f"{gone[0]} is gone" if names and gone else ""


def changed_setting(was: dict[str, Any], now: dict[str, Any]) -> str:
    """The first setting that differs, in words; "" if none does."""
    now = json.loads(json.dumps(now))  # tuples become lists, as they are in the record
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            return f"{key} was {was.get(key)!r} and is {now.get(key)!r}"
    return ""


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write a folder's record and sync it. Raises UserError if it cannot be written."""
    sealed = content | {"digest": json_digest(content)}
    with atomic_write(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(sealed, indent=2) + "\n")


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """A folder's record; None if it is missing or damaged."""
    try:
        content = json.loads(Path(folder, MANIFEST).read_text())
        digest = content.pop("digest")
    except (OSError, ValueError, AttributeError, KeyError):
        return None
    return content if digest == json_digest(content) else None


def lock_folder(folder: Path, busy: str) -> IO[str]:
    """Hold `folder` for this process until the returned file is closed.

    Raises UserError if it cannot be written or another process holds it; `busy` is what that one
    does. A file system without locks gets a warning and no lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # NFS locks only what is open for writing
    except OSError as error:
        reason = f"{error.strerror}; wanted a folder that can be written"
        raise UserError(f"{folder}: {reason}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{folder}: {busy}; wait for it, or name another folder") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(f"{folder}: cannot be locked: {error.strerror}") from None
        print(
            f"warning: {folder}: this file system has no locks ({error.strerror}); "
            "see to it that no other process writes here",
            file=sys.stderr,
        )
    return file

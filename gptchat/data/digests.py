"""Digests by which changed or damaged files are noticed: BLAKE2b of a file's bytes, 16 bytes long.

A file that somebody else may edit is compared by size and modification time first. Its digest is
taken only if the time differs, so an unchanged file costs no reading, and a mere `touch` does not
count as a change. An edit that keeps the size and sets the old time again is seen by whoever
compares digests only, as `gptchat shards --verify` does.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from gptchat.console import UserError

FileState = dict[str, Any]  # "bytes" and "digest", of a source file "mtime_ns", too


def new_digest(data: Any = b"") -> "hashlib.blake2b":
    """The digest of `data` (bytes or an array), to which `update` adds more."""
    return hashlib.blake2b(data, digest_size=16)


def file_digest(path: str | Path) -> str:
    """The digest of a whole file, read in blocks (about 1 GB a second)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, new_digest).hexdigest()


def source_state(path: Path) -> FileState:
    """A source file's size, time and digest, to be taken before the file is read.

    The digest comes last: of a file that is edited while it is read, size, time or digest differ
    from those of the finished edit. Raises UserError for a file that cannot be read.
    """
    try:
        status = path.stat()
        digest = file_digest(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "digest": digest}


def is_unchanged(path: str | Path, state: FileState) -> bool:
    """Whether a source file is still what it was; it is read only if its time differs."""
    status = os.stat(path)
    if status.st_size != state["bytes"]:
        return False
    if status.st_mtime_ns == state["mtime_ns"]:
        return True
    return source_state(Path(path))["digest"] == state["digest"]


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """The content with its own digest as "digest", by which `is_sealed` notices any change."""
    return content | {"digest": _json_digest(content)}


def is_sealed(content: dict[str, Any]) -> bool:
    """Whether `content` is what `seal` returned."""
    unsealed = {key: value for key, value in content.items() if key != "digest"}
    return content.get("digest") == _json_digest(unsealed)


def _json_digest(content: dict[str, Any]) -> str:
    return new_digest(json.dumps(content, sort_keys=True).encode()).hexdigest()

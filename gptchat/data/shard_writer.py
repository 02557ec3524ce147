"""Writes the files of one split of a folder of shards; shards.py says what they hold."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptchat.data import digests
from gptchat.data.encoding import Encoded


class Writer:
    """Writes the files of one split under temporary names, and counts what it writes."""

    def __init__(self, prefix: str, dtype: np.dtype, shard_tokens: int):
        self.prefix = prefix  # FOLDER/SPLIT-
        self.itemsize = dtype.itemsize
        self.shard_tokens = shard_tokens  # ids in a file
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
            number, used = divmod(self.counts["tokens"], self.shard_tokens)
            part = data[: (self.shard_tokens - used) * self.itemsize]
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

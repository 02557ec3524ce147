"""Text out of UTF-8 files, in pieces or line by line.

All readers have this in common:
- A file whose name ends in `.gz` is decompressed. Sizes, bytes and line numbers are those of the
  text in it.
- A byte order mark at the beginning is left out. CR LF and a lone CR are line feeds.
- A UserError names the file, and the byte and line of invalid UTF-8.
- Memory is flat: they hold a piece, or a line of at most LONGEST_LINE characters.
"""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import IncrementalNewlineDecoder
from pathlib import Path
from typing import BinaryIO, cast

from gptchat.console import UserError

PIECE = 1 << 16  # bytes read at once
LONGEST_LINE = 1_000_000  # characters
# What files begin with that are no UTF-8 text.
MAGIC = {
    b"\x1f\x8b": "gzip data; wanted text, or a name that ends in .gz of text compressed once",
    b"\xfd7zXZ": "xz data; wanted text, or gzip (.gz)",
    b"BZh91AY": "bzip2 data; wanted text, or gzip (.gz)",
    b"\x28\xb5\x2f\xfd": "zstd data; wanted text, or gzip (.gz)",
    b"PK\x03\x04": "a zip archive; wanted the files in it",
    b"%PDF-": "a PDF document; wanted its text",
    b"\xff\xfe": "UTF-16; wanted UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16; wanted UTF-8 (iconv -f UTF-16 -t UTF-8)",
}


def is_gzip(path: str | Path) -> bool:
    """Whether a file's ending says that it is compressed."""
    return Path(path).suffix.lower() == ".gz"


@contextmanager
def open_bytes(path: str | Path) -> Iterator[BinaryIO]:
    """The bytes of a file's text. Raises UserError for a file that cannot be read."""
    try:
        with open(path, "rb") as file:
            if is_gzip(path):
                yield cast(BinaryIO, gzip.GzipFile(fileobj=file))
            else:
                yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: found damaged gzip data ({error}); wanted a gzip file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def to_bytes(text: str, path: str | Path) -> bytes:
    """What a file of that name contains if its text is this one."""
    data = text.encode()
    return gzip.compress(data, mtime=0) if is_gzip(path) else data


def text_size(path: Path) -> int:
    """Bytes of a file's text. A compressed file is read once for it (about 300 MB a second)."""
    status = path.stat()
    if not is_gzip(path):
        return status.st_size
    return _uncompressed_size(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _uncompressed_size(path: Path, size: int, mtime_ns: int) -> int:
    """Bytes of a compressed file's text. Size and time identify the file's state for the cache."""
    with open_bytes(path) as file:
        return sum(map(len, iter(lambda: file.read(1 << 20), b"")))


def read_text(path: str | Path, size: int = PIECE) -> Iterator[str]:
    """The text of a file, read `size` bytes at a time.

    A piece ends with a line feed, if there is one in it, or with the file.
    """
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = IncrementalNewlineDecoder(utf8, translate=True)
    n_lines = 1
    rest = ""  # the beginning of a line whose end has not been read
    is_last = False
    with open_bytes(path) as file:
        while not is_last:
            data = file.read(size)
            if file.tell() == len(data):
                _refuse_other_formats(path, data)
            is_last = not data
            try:
                text = decoder.decode(data, is_last)
            except UnicodeDecodeError as error:
                position = file.tell() - len(error.object) + error.start
                before = error.object[: error.start]
                n_lines += before.count(b"\n") + before.count(b"\r") - before.count(b"\r\n")
                raise UserError(
                    f"{path}: byte {position}: found invalid UTF-8 in line {n_lines}; "
                    "wanted UTF-8 (iconv converts from others, such as Latin-1)"
                ) from None
            n_lines += text.count("\n")
            lines, line_feed, end = text.rpartition("\n")
            if line_feed:
                yield rest + lines + line_feed
                rest = end
            elif rest or end:
                yield rest + end
                rest = ""
    if rest:
        yield rest


def _refuse_other_formats(path: str | Path, data: bytes) -> None:
    """Raise UserError if a file that begins with `data` is no UTF-8 text."""
    for magic, problem in MAGIC.items():
        if data.startswith(magic):
            raise UserError(f"{path}: found {problem}")
    if data[:1000].count(0) > 100:  # half of UTF-16's bytes in English
        raise UserError(f"{path}: found NULs; wanted UTF-8 (iconv converts from others)")


def read_lines(path: str | Path) -> Iterator[str]:
    """The lines of a file, without their ends.

    Raises UserError for a line of more than LONGEST_LINE characters, of which little more is read.
    """
    number = 1
    rest = ""  # the beginning of a line whose end has not been read
    for text in read_text(path):
        *lines, rest = (rest + text).split("\n")
        longest = lines[0] if lines else rest  # the others are shorter than a piece
        if len(longest) > LONGEST_LINE:
            raise UserError(
                f"{path}:{number}: found a line of more than {LONGEST_LINE:,} characters; "
                "wanted a dialogue a line"
            )
        yield from lines
        number += len(lines)
    if rest:
        yield rest


def filled_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(number, line) of every line that is not empty."""
    for number, line in enumerate(read_lines(path), 1):
        if line:
            yield number, line

"""Text of UTF-8 files, in pieces or line by line.

- A file whose name ends in `.gz` is decompressed. Sizes, bytes and line numbers are those of the
  text in it.
- A byte order mark at the beginning is left out. CR LF and a lone CR become line feeds.
- Invalid UTF-8 and formats that are no text raise UserError, with the byte and line.
- Memory is flat: a piece is held, or a line of at most LONGEST_LINE characters.
"""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import IncrementalNewlineDecoder
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

from gptchat.console import UserError

PIECE = 1 << 16  # bytes read at once
LONGEST_LINE = 1_000_000  # characters
# How files begin that are no UTF-8 text.
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
    return Path(path).suffix.lower() == ".gz"


@contextmanager
def open_bytes(path: str | Path) -> Iterator[BinaryIO]:
    """A file of the text's bytes. Raises UserError, also while it is read."""
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
    """The content of a file of that name with this text."""
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
    # Size and time of the file are arguments for the cache.
    with open_bytes(path) as file:
        return sum(map(len, iter(lambda: file.read(1 << 20), b"")))


def read_text(path: str | Path, size: int = PIECE) -> Iterator[str]:
    """The text of a file, read `size` bytes at a time; a piece with a line feed ends with one."""
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
    for magic, problem in MAGIC.items():
        if data.startswith(magic):
            raise UserError(f"{path}: found {problem}")
    if data[:1000].count(0) > 100:  # half of UTF-16's bytes in English
        raise UserError(f"{path}: found NULs; wanted UTF-8 (iconv converts from others)")


def filled_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(number, line) of every line that is not empty, without its end.

    Raises UserError for a line of more than LONGEST_LINE characters, of which little more is read.
    """
    number = 1
    rest = ""  # the beginning of a line whose end has not been read
    for text in chain(read_text(path), ["\n"]):
        *lines, rest = (rest + text).split("\n")
        longest = lines[0] if lines else rest  # the others are shorter than a piece
        if len(longest) > LONGEST_LINE:
            raise UserError(
                f"{path}:{number}: found a line of more than {LONGEST_LINE:,} characters; "
                "wanted a dialogue a line"
            )
        yield from ((n, line) for n, line in enumerate(lines, number) if line)
        number += len(lines)

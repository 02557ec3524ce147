"""Text out of UTF-8 files: block by block, line by line, or a sample of it.

Invariants, the same for all readers:
- A file whose name ends in `.gz` is decompressed; places, sizes and line numbers are those of the
  text in it.
- A byte order mark at the beginning of a file is left out. CR LF and a lone CR are line feeds.
- A UserError names file, byte and line of invalid UTF-8, and a file that cannot be read or, where
  it is compressed, is damaged.
- Memory is flat: at most one block, or one line of at most LONGEST_LINE characters, is held.
"""

import codecs
import gzip
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import IncrementalNewlineDecoder
from pathlib import Path
from typing import BinaryIO, cast

from gptchat.console import UserError

PIECE = 1 << 16  # bytes read at once, for lines and samples
LONGEST_LINE = 1_000_000  # characters
BYTE_ORDER_MARK = "\ufeff"
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of a UTF-8 character, after its first byte


@dataclass(frozen=True)
class Span:
    """A file of whose text only the bytes start..stop-1 are read; elsewhere it is the file's path.

    It begins and ends at a line end, or where the file does. Line numbers are those of the file.
    """

    path: Path
    start: int
    stop: int

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


Source = str | os.PathLike[str]  # a path, or a Span


def is_gzip(path: Source) -> bool:
    """Whether a file is compressed, which its ending says."""
    return Path(path).suffix.lower() == ".gz"


@contextmanager
def open_bytes(path: Source) -> Iterator[BinaryIO]:
    """The bytes of a file's text, to be read.

    Raises UserError where the file cannot be opened or read, or is no whole gzip file.
    """
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
    """What a file of that name holds if its text is this one."""
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
    """Bytes of a compressed file's text; size and time tell the file from what it was before."""
    with open_bytes(path) as file:
        return sum(map(len, iter(lambda: file.read(1 << 20), b"")))


def read_text(
    path: Source, size: int, on_invalid: Callable[[int, int], None] | None = None
) -> Iterator[str]:
    """The text of a file, `size` bytes at a time.

    `on_invalid`, where given, gets byte and line of the file's first invalid UTF-8 instead of a
    UserError; what is invalid then becomes U+FFFD.
    """
    start = path.start if isinstance(path, Span) else 0
    utf8 = codecs.getincrementaldecoder("utf-8" if start else "utf-8-sig")()
    decoder = IncrementalNewlineDecoder(utf8, translate=True)
    line_ends = 0  # so far
    is_last = False
    with open_bytes(path) as file:
        file.seek(start)
        while not is_last:
            if isinstance(path, Span):
                size = min(size, path.stop - file.tell())
            data = file.read(size)
            is_last = not data
            try:
                text = decoder.decode(data, is_last)
            except UnicodeDecodeError as error:
                position = file.tell() - len(error.object) + error.start
                line = first_line(path) + line_ends + count_line_ends(error.object[: error.start])
                if on_invalid is None:
                    raise UserError(
                        f"{path}: byte {position}: found invalid UTF-8 in line {line}"
                    ) from None
                on_invalid(position, line)
                utf8.errors = "replace"
                text = decoder.decode(data, is_last)
            line_ends += text.count("\n")
            yield text


def read_lines(path: Source, on_invalid: Callable[[int, int], None] | None = None) -> Iterator[str]:
    """The lines of a file, without their ends. `on_invalid` is that of `read_text`.

    Raises UserError for a line of more than LONGEST_LINE characters, of which little more is read.
    """
    number = first_line(path) - 1  # lines so far
    rest = ""  # what follows the last line end
    for text in read_text(path, PIECE, on_invalid):
        *lines, rest = (rest + text).split("\n")
        if lines:  # only the first can be too long: the others are shorter than PIECE
            _check_length(lines[0], path, number + 1)
        yield from lines
        number += len(lines)
        _check_length(rest, path, number + 1)
    if rest:
        yield rest


def _check_length(line: str, path: Source, number: int) -> None:
    if len(line) > LONGEST_LINE:
        raise UserError(
            f"{path}:{number}: found a line of more than {LONGEST_LINE:,} characters; "
            "wanted a dialogue a line"
        )


def first_line(path: Source) -> int:
    """The number of the first line that is read; what stands before a Span is read for it."""
    if not isinstance(path, Span) or path.start == 0:
        return 1
    before = Span(path.path, 0, path.start)
    return 1 + sum(text.count("\n") for text in read_text(before, 1 << 20))


def count_line_ends(data: bytes) -> int:
    """How many LF, CR LF and lone CR there are."""
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")


def sample_text(
    paths: Sequence[Path], limit: int, plain_text: Callable[[Path, str], str] | None = None
) -> Iterator[tuple[str, int]]:
    """(text, its bytes in the file): all of the files, or about `limit` bytes spread over them.

    `plain_text`, where given, takes the text that counts out of a piece of a file. A piece is cut
    at line feeds; where a line is longer than a piece, between characters.
    """
    total = sum(map(text_size, paths))
    step = 0  # bytes from the start of a piece to the start of the next; 0: without gaps
    if limit < total:
        n_pieces = max(1, limit // PIECE)
        step = -(-total // n_pieces)  # rounded up
    start = 0  # of the next piece, in bytes from the beginning of the file
    for path in paths:
        size = text_size(path)
        with open_bytes(path) as file:
            reader = _PieceReader(file)
            while start < size:
                after_gap = step > 0 and start > 0
                is_last = start + PIECE >= size
                text, used = _decode_piece(reader.read(start), path, start, after_gap, is_last)
                yield plain_text(path, text) if plain_text else text, used
                start += step or used
        start -= size


class _PieceReader:
    """Reads pieces of PIECE bytes that begin after the beginning of the piece before.

    The file itself is never sought backwards, for which a compressed one would be read anew.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.start = 0  # of the last piece
        self.piece = b""

    def read(self, start: int) -> bytes:
        """The piece that begins at byte `start`; the file's last is shorter."""
        known = self.piece[start - self.start :]
        if not known:
            self.file.seek(start)
        self.start = start
        self.piece = known + self.file.read(PIECE - len(known))
        return self.piece


def _decode_piece(
    data: bytes, path: Path, start: int, after_gap: bool, is_last: bool
) -> tuple[str, int]:
    """(text, its bytes in the file) of the piece `data`, which begins at byte `start`.

    A piece after a gap begins at the first line that begins in it; one that is not the file's last
    ends with the last line that ends in it.
    """
    begin, end = 0, len(data)
    if after_gap:
        begin = _first_line_start(data)
    if not is_last:
        end = data.rfind(b"\n") + 1
        if end == 0:  # a last CR may be half of a CR LF
            end = len(data) - data.endswith(b"\r")
    try:
        text, used = codecs.utf_8_decode(data[begin:end], "strict", is_last)
    except UnicodeDecodeError as error:
        position = start + begin + error.start
        raise UserError(f"{path}: byte {position}: found invalid UTF-8") from None
    if start == 0:
        text = text.removeprefix(BYTE_ORDER_MARK)
    return text.replace("\r\n", "\n").replace("\r", "\n"), used


def _first_line_start(data: bytes) -> int:
    """Where the first line begins in `data`; if none does, where the first character begins."""
    line_start = data.find(b"\n") + 1
    if line_start > 0:
        return line_start
    return len(data) - len(data.lstrip(CONTINUATION_BYTES))

"""Text out of UTF-8 files: block by block, line by line, or a sample of it.

Invariants, the same for all readers:
- A byte order mark at the beginning of a file is left out. CR LF and a lone CR are line feeds.
- A UserError names file, byte and line of invalid UTF-8, and a file that cannot be read.
- Memory is flat: at most one block, or one line of at most LONGEST_LINE characters, is held.
"""

import codecs
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import IncrementalNewlineDecoder
from pathlib import Path
from typing import BinaryIO

from gptchat.console import UserError

PIECE = 1 << 16  # bytes read at once, for lines and samples
LONGEST_LINE = 1_000_000  # characters
BYTE_ORDER_MARK = "\ufeff"
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of a UTF-8 character, after its first byte


@contextmanager
def open_bytes(path: str | Path) -> Iterator[BinaryIO]:
    """The file, open for reading. Raises UserError where it cannot be opened or read."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_text(path: str | Path, size: int) -> Iterator[str]:
    """The text of a file, `size` bytes at a time."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = IncrementalNewlineDecoder(utf8, translate=True)
    line_ends = 0  # so far
    is_last = False
    with open_bytes(path) as file:
        while not is_last:
            data = file.read(size)
            is_last = not data
            try:
                text = decoder.decode(data, is_last)
            except UnicodeDecodeError as error:
                position = file.tell() - len(error.object) + error.start
                line = 1 + line_ends + count_line_ends(error.object[: error.start])
                raise UserError(
                    f"{path}: byte {position}: found invalid UTF-8 in line {line}"
                ) from None
            line_ends += text.count("\n")
            yield text


def read_lines(path: str | Path) -> Iterator[str]:
    """The lines of a file, without their ends.

    Raises UserError for a line of more than LONGEST_LINE characters, of which little more is read.
    """
    number = 0  # lines so far
    rest = ""  # what follows the last line end
    for text in read_text(path, PIECE):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            number += 1
            _check_length(line, path, number)
            yield line
        _check_length(rest, path, number + 1)
    if rest:
        yield rest


def _check_length(line: str, path: str | Path, number: int) -> None:
    if len(line) > LONGEST_LINE:
        raise UserError(
            f"{path}:{number}: found a line of more than {LONGEST_LINE:,} characters; "
            "wanted a dialogue a line"
        )


def count_line_ends(data: bytes) -> int:
    """How many LF, CR LF and lone CR there are."""
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")


def sample(paths: Sequence[Path], limit: int) -> Iterator[tuple[str, int]]:
    """(text, its bytes in the file): all of the files, or about `limit` bytes spread over them.

    A piece is cut at line feeds; where a line is longer than a piece, between characters.
    """
    total = sum(path.stat().st_size for path in paths)
    step = 0  # bytes from the start of a piece to the start of the next; 0: without gaps
    if limit < total:
        n_pieces = max(1, limit // PIECE)
        step = -(-total // n_pieces)  # rounded up
    start = 0  # of the next piece, in bytes from the beginning of the file
    for path in paths:
        size = path.stat().st_size
        with open_bytes(path) as file:
            while start < size:
                after_gap = step > 0 and start > 0
                is_last = start + PIECE >= size
                text, used = _read_piece(file, start, after_gap, is_last)
                yield text, used
                start += step or used
        start -= size


def _read_piece(file: BinaryIO, start: int, after_gap: bool, is_last: bool) -> tuple[str, int]:
    """(text, its bytes in the file) of at most PIECE bytes from `start` on.

    A piece after a gap begins at the first line that begins in it; one that is not the file's last
    ends with the last line that ends in it.
    """
    file.seek(start)
    data = file.read(PIECE)
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
        raise UserError(f"{file.name}: byte {position}: found invalid UTF-8") from None
    if start == 0:
        text = text.removeprefix(BYTE_ORDER_MARK)
    return text.replace("\r\n", "\n").replace("\r", "\n"), used


def _first_line_start(data: bytes) -> int:
    """Where the first line begins in `data`; if none does, where the first character begins."""
    line_start = data.find(b"\n") + 1
    if line_start > 0:
        return line_start
    return len(data) - len(data.lstrip(CONTINUATION_BYTES))

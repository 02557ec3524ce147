"""Parts of the work of `gptchat shards`: which bytes of the text files are part 3 of 16.

The files of a split stand one behind the other in the order in which the config names them, and
part k of N has the bytes from (k - 1)/N to k/N of them all. Both places move on to the next place
where a document or dialogue begins: behind a blank line (`document = "block"`) or a line end, or at
the next file (`document = "file"`, compressed files). So a document is in exactly one part, parts
differ in size by a document or a file, and a part can be empty. Parts depend on the files' sizes
and on what stands around these places only: each machine finds the same ones by itself.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gptchat.config import Config
from gptchat.console import UserError
from gptchat.data.reading import Source, Span, is_gzip, open_bytes, text_size

BLOCK = 1 << 16  # bytes read at once where a beginning is looked for
# Where one line begins, and where the one behind a blank line does. Atomic groups: the line feed of
# a CR LF is no line end of its own.
LINE_END = re.compile(rb"(?>\r\n|\r|\n)")
BLANK_LINE = re.compile(rb"(?>\r\n|\r|\n){2}")


class Part(NamedTuple):
    """Part `number` of `total`, counted from 1."""

    number: int
    total: int

    @property
    def folder(self) -> str:
        """The name of its folder in the folder of shards."""
        return f"part-{self.number:05d}-of-{self.total:05d}"


def parse_part(text: str) -> Part:
    """The part that `--part 3/16` names. Raises UserError for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,4})/([1-9]\d{0,4})", text)
    if not match or int(match[1]) > int(match[2]):
        raise UserError(f"--part: found {text!r}; wanted a number and how many, such as 3/16")
    return Part(int(match[1]), int(match[2]))


def parts_in(folder: Path) -> list[Part]:
    """The parts whose folders stand in a folder of shards, in their order; no other names."""
    parts: list[Part] = []
    for path in folder.glob("part-*-of-*"):
        match = re.fullmatch(r"part-([0-9]{5})-of-([0-9]{5})", path.name)
        if match and 1 <= int(match[1]) <= int(match[2]):
            parts.append(Part(int(match[1]), int(match[2])))
    return sorted(parts)


def sources_of(paths: Sequence[Path], part: Part, config: Config) -> list[Source]:
    """What is read for a part: whole files, and Spans of files that it shares with others."""
    total = sum(map(text_size, paths))
    first = total * (part.number - 1) // part.total
    last = total * part.number // part.total
    sources: list[Source] = []
    offset = 0  # of the file in all text
    for path in paths:
        size = text_size(path)
        start = _next_beginning(path, first - offset, size, config)
        stop = _next_beginning(path, last - offset, size, config)
        if start == 0 and stop == size:
            sources.append(path)
        elif start < stop:
            sources.append(Span(path, start, stop))
        offset += size
    return sources


def _next_beginning(path: Path, place: int, size: int, config: Config) -> int:
    """The first byte, from `place` on, at which a document or dialogue begins; `size` if none."""
    if place <= 0:
        return 0
    by_file = config.task == "lm" and config.data.document == "file"
    if place >= size or by_file or is_gzip(path):
        return size
    by_block = config.task == "lm" and config.data.document == "block"
    pattern = BLANK_LINE if by_block else LINE_END
    with open_bytes(path) as file:
        begin = place - 1  # a line that ends with this byte ends before `place`
        file.seek(begin)
        data = b""
        while True:
            more = file.read(BLOCK)
            data += more
            match = pattern.search(data)
            if match and (match.end() < len(data) or not more):
                return begin + match.end()
            if not more:
                return size
            if not match:  # but a line end may go on in the next bytes
                begin += max(0, len(data) - 4)
                data = data[-4:]

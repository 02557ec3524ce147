"""One file of text or dialogues, looked through for `gptchat check`: counts, hashes, odd places.

A file is read three times: its bytes for lone CRs, its text for characters and what looks private,
its documents for the rest. Nothing is encoded, which would take most of the time: tokens are
estimated from characters.

Invariants:
- Unlike the readers of training, a scan goes on behind what is wrong and counts it.
- Memory is flat but for 8 bytes a document, the BLAKE2b hash of its whole text, wherever it is cut
  into pieces when it is read; two of a billion documents are mixed up in one of 37 checks.
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gptchat.config import Config, DataConfig
from gptchat.console import UserError
from gptchat.data.dialogue import alternate, excerpts, fit, input_length
from gptchat.data.dialogue_files import is_jsonl, parse_messages, parse_row
from gptchat.data.encoding import read_documents
from gptchat.data.reading import open_bytes, read_lines, read_text
from gptchat.data.splits import (
    HASHED,
    SPLITS,
    as_number,
    hash_of,
    new_hash,
    split_and_hash,
    split_of,
)

# Bytes read at once. Blocks of 128 KB or more come from glibc's mmap at first, and later from its
# heap, where they leave holes: 208 MB instead of 123 for 10 GB of text.
BLOCK = 1 << 16
PLACES = 5  # that are kept of each finding
LONE_CR = re.compile(rb"\r(?!\n)")
EMAIL = re.compile(r"@[\w-]+\.\w")  # from the @ on, which is searched for fastest
# Nine digits or more, in one piece or in groups of two to four: telephones, cards, accounts. `+`
# behind a repetition keeps what it took: giving it back never helps here, and takes time.
NUMBER = re.compile(
    r"[0-9](?:[0-9]{8}|[0-9]{0,3}+\)?[ .-]{1,2}+[0-9]{2,4}+(?:[ .-][0-9]{2,4}+){1,4}(?![0-9]))"
)
DATE_OR_YEARS = re.compile(r"[12][0-9]{3}(?:[ .-][01][0-9][ .-]|(?:[ .-]{1,2}[12][0-9]{3})+$)")


@dataclass
class Finding:
    """What occurs `count` times; `places` are the first ones, as FILE:LINE or in words."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str, count: int = 1) -> None:
        self.count += count
        if len(self.places) < PLACES:
            self.places.append(place)


@dataclass
class FileScan:
    """What was found in one file. `split` is "" where each document has its own (held_out)."""

    name: str
    split: str
    n_bytes: int = 0  # of text in the file, decompressed
    n_characters: int = 0  # of documents or turns
    n_documents: int = 0
    long_rows: int = 0  # dialogues that do not fit into the context
    cut_rows: int = 0  # those of them that are not read in several parts, but cut
    cut_tokens: int = 0  # what is cut of them, estimated
    warnings: dict[str, Finding] = field(default_factory=dict)
    refusals: dict[str, Finding] = field(default_factory=dict)  # what training would not take
    hashes: dict[str, array] = field(default_factory=dict)  # split -> of its documents, in order

    def warn(self, kind: str, place: str, count: int = 1) -> None:
        self.warnings.setdefault(kind, Finding()).add(place, count)

    def refuse(self, kind: str, place: str) -> None:
        self.refusals.setdefault(kind, Finding()).add(place)

    def add_document(self, text_hash: int, split: str, n_characters: int) -> None:
        self.n_documents += 1
        self.n_characters += n_characters
        if split not in self.hashes:
            self.hashes[split] = array("Q")
        self.hashes[split].append(text_hash)

    def note_invalid(self, byte: int, line: int) -> None:
        self.refuse("invalid UTF-8", f"{self.name}:{line} (byte {byte})")


def scan_file(
    path: Path, split: str, config: Config, n_ctx: int, characters_per_token: float
) -> FileScan:
    """Look through a file of a split. With `n_ctx` 0 nothing counts as too long."""
    scan = FileScan(str(path), split)
    try:
        _scan_bytes(path, scan)
        _scan_characters(path, scan)
        if config.task == "chatlm":
            _scan_dialogues(path, scan, config.data, n_ctx, characters_per_token)
        else:
            _scan_documents(path, scan, config)
    except UserError as error:  # it cannot be read, or has an endless line
        scan.refuse(*_split_message(error, scan.name))
    return scan


def parse_texts(line: str, source: str, as_jsonl: bool) -> tuple[list[str], list[int]]:
    """(texts, speakers) of the dialogue in one line, the response last.

    Where the speakers alternate, in TSV, there are none: in short rows they would take as long as
    the rest. Raises UserError that begins with `source`.
    """
    if not as_jsonl:
        return parse_row(line, source, 2), []
    turns = parse_messages(line, source, ends_with_response=True)
    return [text for _, text in turns], [speaker for speaker, _ in turns]


def texts_of(path: Path, config: Config) -> Iterator[str]:
    """The documents or turns of a file, without what cannot be read."""

    def ignore(byte: int, line: int) -> None: ...

    if config.task == "lm":
        for text, _ in read_documents(path, config.data.document, BLOCK, ignore):
            yield text
        return
    as_jsonl = is_jsonl(path)
    for line in filter(None, read_lines(path, ignore)):
        try:
            texts, _ = parse_texts(line, "", as_jsonl)
        except UserError:
            continue
        yield from texts


def _scan_bytes(path: Path, scan: FileScan) -> None:
    """Count bytes and lone CRs, old line ends that begin a new line wherever they stand."""
    n_lines = 0
    rest = b""  # a CR at the end of a block, which may be half of a CR LF
    with open_bytes(path) as file:
        while block := file.read(BLOCK):
            scan.n_bytes += len(block)
            block = rest + block
            rest = b"\r" if block.endswith(b"\r") else b""
            block = block.removesuffix(rest)
            n_lone = block.count(b"\r") - block.count(b"\r\n")
            if n_lone and "lone CR" not in scan.warnings:
                match = LONE_CR.search(block)
                assert match
                line = 1 + n_lines + block.count(b"\n", 0, match.start())
                scan.warn("lone CR", f"{path}:{line}", 0)
            if n_lone:
                scan.warnings["lone CR"].count += n_lone
            n_lines += block.count(b"\n")
    if rest:
        scan.warn("lone CR", f"{path}:{n_lines + 1}")


def _scan_characters(path: Path, scan: FileScan) -> None:
    """Find NULs, and what looks like e-mail addresses and private numbers, by line."""
    n_lines = 0
    rest = ""  # an unfinished line
    for text in read_text(path, BLOCK, scan.note_invalid):
        head, line_end, tail = text.rpartition("\n")
        if not line_end and len(rest) < BLOCK:
            rest += text
            continue
        _scan_lines(rest + head, n_lines, scan)
        n_lines += (rest + head + line_end).count("\n")
        rest = tail
    _scan_lines(rest, n_lines, scan)


def _scan_lines(text: str, n_lines: int, scan: FileScan) -> None:
    """Scan whole lines, before which the file has `n_lines`."""

    def note(kind: str, position: int) -> None:
        finding = scan.warnings.get(kind)
        if finding and len(finding.places) == PLACES:  # the line need not be counted
            finding.count += 1
            return
        scan.warn(kind, f"{scan.name}:{1 + n_lines + text.count(chr(10), 0, position)}")

    position = text.find("\0")
    while position >= 0:
        note("NUL", position)
        position = text.find("\0", position + 1)
    for match in EMAIL.finditer(text):
        if match.start() > 0 and text[match.start() - 1].isalnum():
            note("e-mail address", match.start())
    for match in NUMBER.finditer(text):
        number = match.group()
        if sum(map(str.isdigit, number)) >= 9 and not DATE_OR_YEARS.match(number):
            note("number that looks private", match.start())


def _scan_documents(path: Path, scan: FileScan, config: Config) -> None:
    """Count and hash the documents of a text."""
    running_hash = new_hash()
    n_characters = 0  # so far, of a document that comes in several pieces
    beginning = ""  # of it, as much as its split depends on
    held_out = config.data.held_out
    # Invalid UTF-8 was noted before.
    for text, ends in read_documents(path, config.data.document, BLOCK, lambda byte, line: None):
        running_hash.update(text.encode(errors="replace"))
        n_characters += len(text)
        if held_out > 0 and len(beginning) < HASHED:
            beginning += text
        if ends:
            split = scan.split or split_of(beginning[:HASHED], held_out)
            scan.add_document(as_number(running_hash), split, n_characters)
            running_hash = new_hash()
            n_characters = 0
            beginning = ""


def _scan_dialogues(
    path: Path, scan: FileScan, data: DataConfig, n_ctx: int, characters_per_token: float
) -> None:
    """Count and hash dialogues, and those that do not fit; note lines that are none."""
    name = scan.name  # in rows by the hundred thousand, str(path) takes time
    as_jsonl = is_jsonl(path)
    longest = n_ctx * characters_per_token  # characters, about
    hashes = scan.hashes = {split: array("Q") for split in SPLITS}
    for number, line in enumerate(read_lines(path, lambda byte, line: None), 1):
        if not line:
            continue
        try:
            texts, speakers = parse_texts(line, name, as_jsonl)
        except UserError as error:
            scan.refuse(*_split_message(error, name, number))
            continue
        whole = "\0".join(texts)  # no text has a NUL
        n_characters = len(whole) - len(texts) + 1
        # `add_document` written out, which is a tenth faster in short rows
        scan.n_documents += 1
        scan.n_characters += n_characters
        if scan.split:
            hashes[scan.split].append(hash_of(whole))
        else:
            split, text_hash = split_and_hash(whole, len(texts[-1]), data.held_out)
            hashes[split].append(text_hash)
        if 0 < longest < n_characters:
            speakers = speakers or [speaker for speaker, _ in alternate(texts)]
            lengths = [int(len(text) / characters_per_token) for text in texts]
            _count_long_row(scan, lengths, speakers, n_ctx, data.targets)


def _count_long_row(
    scan: FileScan, lengths: Sequence[int], speakers: Sequence[int], n_ctx: int, targets: str
) -> None:
    """Count a dialogue, given the tokens and speakers of its turns, that may not fit."""
    cut_tokens = 0
    for first, last in excerpts(lengths, speakers, n_ctx, targets):
        part = lengths[first:last]
        cut_tokens += max(0, input_length(part) - fit(part, n_ctx).length)
    scan.long_rows += input_length(lengths) > n_ctx
    scan.cut_rows += cut_tokens > 0
    scan.cut_tokens += cut_tokens


def _split_message(error: UserError, name: str, line: int = 0) -> tuple[str, str]:
    """(what was found, FILE:LINE or the whole error) of an error in a file, or a line of it."""
    message = str(error).removeprefix(f"{name}: ")
    place = f"{name}:{line}" if line else name
    found = re.sub(r"\d+", "N", message.partition("; wanted")[0])  # one kind for all columns
    return found, f"{place}: {message}"

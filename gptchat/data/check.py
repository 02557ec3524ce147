"""Look through the data of a config before it is trained on: `gptchat check --config FILE`.

It reads documents and dialogues as training does, and prints how much there is, what occurs twice
or in two splits, which rows are too long, what training would refuse, and a verdict. Exit status 2
if training would refuse something.

- A line that is no dialogue does not end the search, but a file that cannot be read to its end is
  given up where that is.
- Documents are duplicates if their texts are equal; dialogues, if the texts of all turns are.
- Nothing is encoded. Tokens are estimated from the bytes of text and the size of the vocabulary.
- Memory is flat but for 8 bytes a document.
"""

import json
import math
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from gptchat.config import Config, load_run_config
from gptchat.console import CommandParser, Progress, UserError
from gptchat.data.dialogue import TextTurn, excerpts, fit, input_length
from gptchat.data.dialogue_files import TSV, format_of
from gptchat.data.encoding import read_documents
from gptchat.data.reading import PIECE
from gptchat.data.splits import (
    HASHED,
    SPLITS,
    as_number,
    empty_splits,
    hash_of,
    new_hash,
    split_of,
    split_of_dialogue,
    split_patterns,
)
from gptchat.files import expand, file_id, matching_files

MANY = 0.01  # share of duplicates or cut rows from which on they are a warning
SHOWN = 20  # lines of refusals
# Names of a spreadsheet's columns.
HEADER = re.compile(
    r"\W*(?:context|response|prompt|completion|question|answer|query|reply|input|output|instruction"
    r"|user|assistant|human|bot|speaker|message|text|turn|utterance|source|target|id|index)"
    r"[\s_]*\w?\W*",
    re.IGNORECASE,
)


@dataclass
class Report:
    """What `check` found."""

    task: str
    n_ctx: int  # 0: that of a model that is not there yet
    bytes_per_token: float
    n_files: int = 0
    n_bytes: int = 0  # of the files, compressed or not
    text_bytes: int = 0  # UTF-8 of documents or turns
    documents: Counter[str] = field(default_factory=Counter)  # of each of `split_patterns`
    hashes: dict[str, array] = field(default_factory=lambda: {s: array("Q") for s in SPLITS})
    duplicates: int = 0  # documents of train that occur in it before
    overlap: dict[str, int] = field(default_factory=dict)  # documents of the split also in train
    long_rows: int = 0  # dialogues that do not fit into the context
    cut_rows: int = 0  # those of them that are not read in several parts, but cut
    cut_tokens: int = 0  # what is cut of them, estimated
    unread_keys: Counter[str] = field(default_factory=Counter)  # of JSON, that nothing reads
    warnings: list[str] = field(default_factory=list)
    refused: dict[str, tuple[str, int]] = field(default_factory=dict)  # kind -> (message, number)

    @property
    def unit(self) -> str:
        return "documents" if self.task == "lm" else "dialogues"

    @property
    def n_tokens(self) -> float:
        return self.text_bytes / self.bytes_per_token

    @property
    def refusals(self) -> list[str]:
        """The first message of each kind, and how many more there are."""
        return [
            f"{first} (and {count - 1:,} more)" if count > 1 else first
            for first, count in self.refused.values()
        ]

    def refuse(self, message: str, place: str = "") -> None:
        """Note what training would refuse; `place` is what a message of its kind differs in."""
        kind = re.sub(r"'[^']*'|\d+", "", message.removeprefix(place))
        first, count = self.refused.get(kind, (message, 0))
        self.refused[kind] = (first, count + 1)

    def add(self, split: str, drawn: str, text_hash: int, n_bytes: int) -> None:
        """Count a document of a file of `split`; `drawn` is its own split if some are held out."""
        if drawn in ("valid", "test"):
            split = drawn
        self.documents[split] += 1
        self.text_bytes += n_bytes
        self.hashes[split.partition("-")[0]].append(text_hash)

    def note_length(self, turns: list[TextTurn], targets: str) -> None:
        """Count a dialogue if it is too long for the context."""
        lengths = [int(len(text.encode()) / self.bytes_per_token) for _, text in turns]
        if self.n_ctx == 0 or input_length(lengths) <= self.n_ctx:
            return
        cut_tokens = 0
        speakers = [speaker for speaker, _ in turns]
        for first, last in excerpts(lengths, speakers, self.n_ctx, targets):
            part = lengths[first:last]
            cut_tokens += max(0, input_length(part) - fit(part, self.n_ctx).length)
        self.long_rows += 1
        self.cut_rows += cut_tokens > 0
        self.cut_tokens += cut_tokens


class TableSigns:
    """What shows that rows are a spreadsheet's: a header, numbered rows, quoted fields."""

    def __init__(self) -> None:
        self.n_rows = self.n_numbered = self.n_quoted = 0
        self.header: list[str] = []  # the first row, if it looks like one

    def add(self, texts: list[str]) -> None:
        if self.n_rows == 0 and all(HEADER.fullmatch(text) for text in texts):
            self.header = texts
        self.n_rows += 1
        # Rows count from 0 or 1, the header left out.
        is_number = texts[0].isdecimal() and len(texts[0]) < 10
        self.n_numbered += is_number and abs(int(texts[0]) - self.n_rows) <= 2
        self.n_quoted += any(text[:1] == text[-1:] == '"' and len(text) > 1 for text in texts)

    def signs(self) -> list[str]:
        signs = []
        if self.header:
            signs.append(f"the first row looks like a header ({', '.join(self.header)})")
        if 2 * self.n_numbered > self.n_rows > 2:
            signs.append("the first column numbers the rows")
        if 2 * self.n_quoted > self.n_rows:
            signs.append('most rows have a field in quotes ("), which are learned')
        return signs


def bytes_per_token(vocab_size: int) -> float:
    """UTF-8 bytes of a token, estimated: in English 2.1 with 512 entries, 4.1 with 8,192."""
    return max(1.0, min(4.4, 2.1 + 0.5 * math.log2(vocab_size / 512)))


def check(config: Config) -> Report:
    """Look through all files that the config names for its splits."""
    ratio = bytes_per_token(config.tokenizer.vocab_size)
    report = Report(config.task, _context(config), ratio)
    files = _find_files(config, report)
    paths = list(chain.from_iterable(files.values()))
    report.n_files = len(paths)
    report.n_bytes = sum(path.stat().st_size for path in paths)
    read = _read_documents if config.task == "lm" else _read_dialogues
    with Progress(report.n_bytes, "check", "B") as bar:
        for split, listed in files.items():
            for path in listed:
                try:
                    read(path, split, config, report)
                except UserError as error:  # the file cannot be read to its end
                    report.refuse(str(error), str(path))
                bar.update(path.stat().st_size)
    counts = {split: report.documents[split] for split in split_patterns(config.data)}
    for problem in empty_splits(config.data, counts):
        report.refuse(problem)
    _compare(report)
    return report


def _find_files(config: Config, report: Report) -> dict[str, list[Path]]:
    """The files of each of `split_patterns`."""
    files: dict[str, list[Path]] = {}
    split_by_file: dict[tuple[int, int], str] = {}
    for split, patterns in split_patterns(config.data).items():
        if config.data.held_out and split in ("valid", "test"):
            continue  # they are drawn from the files of train
        name = f"[data] {split.partition('-')[0]}"
        n_named = 0
        for pattern in patterns:
            try:
                n_named += len(expand([pattern], name))
            except UserError as error:
                report.refuse(str(error))
        files[split] = matching_files(patterns)
        if n_named > len(files[split]):
            report.warnings.append(f"{name} names {n_named - len(files[split])} files twice")
        for path in files[split]:
            other = split_by_file.setdefault(file_id(path), split)
            if other != split:
                report.warnings.append(f"{path} is in {other} and in {split}")
    return files


def _context(config: Config) -> int:
    """The context, if need be of the model that the run starts from; 0: that is not there yet."""
    if config.model.n_ctx or not config.init_from:
        return config.model.n_ctx
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(Path(config.init_from, "config.json").read_text())["n_positions"])
    return 0


def _read_documents(path: Path, split: str, config: Config, report: Report) -> None:
    text_hash = new_hash()
    n_bytes = 0
    beginning = ""  # as much as the split depends on
    held_out = config.data.held_out
    for text, ends in read_documents(path, config.data.document, PIECE):
        data = text.encode()
        text_hash.update(data)
        n_bytes += len(data)
        if held_out and len(beginning) < HASHED:
            beginning += text
        if ends:
            drawn = split_of(beginning[:HASHED], held_out) if held_out else ""
            report.add(split, drawn, as_number(text_hash), n_bytes)
            text_hash = new_hash()
            n_bytes = 0
            beginning = ""


def _read_dialogues(path: Path, split: str, config: Config, report: Report) -> None:
    format = format_of(path)
    table = TableSigns()
    for number, entry in format.entries(path):
        place = f"{path}:{number}"
        try:
            turns = format.turns(entry, place, False)
        except UserError as error:
            report.refuse(str(error), place)
            continue
        report.unread_keys.update(format.unread_keys(entry))
        if not turns:
            continue
        texts = [text for _, text in turns]
        table.add(texts)
        held_out = config.data.held_out
        drawn = split_of_dialogue(texts, held_out) if held_out else ""
        n_bytes = len("".join(texts).encode())
        report.add(split, drawn, hash_of("\0".join(texts)), n_bytes)
        report.note_length(turns, config.data.targets)
    if format is TSV:
        report.warnings += [f"{path}: {sign}" for sign in table.signs()]


def _compare(report: Report) -> None:
    """Count what occurs twice, and add what follows from the figures to the warnings."""
    hashes = {split: np.array(found, np.uint64) for split, found in report.hashes.items()}
    report.documents = Counter({split: len(found) for split, found in hashes.items()})
    in_train = np.sort(hashes["train"])
    report.duplicates = int((in_train[1:] == in_train[:-1]).sum())
    if report.duplicates > MANY * len(in_train):
        report.warnings.append(f"{report.duplicates:,} duplicates in train")
    for split in ("valid", "test"):
        first = np.searchsorted(in_train, hashes[split], "left")
        behind_last = np.searchsorted(in_train, hashes[split], "right")
        count = report.overlap[split] = int((first < behind_last).sum())
        if count:
            report.warnings.append(f"{count:,} {report.unit} of {split} are in train, too")
    if report.cut_rows > MANY * report.documents.total():
        report.warnings.append(f"{report.cut_rows:,} rows cut to the context")


def verdict(report: Report) -> str:
    """The whole report in a line."""
    if report.refusals:
        more = f" (and {len(report.refusals) - 1} more)" if len(report.refusals) > 1 else ""
        return f"verdict: training would refuse this: {report.refusals[0]}{more}"
    if report.warnings:
        return f"verdict: fine but for {'; '.join(report.warnings)}"
    return "verdict: fine"


def lines_of(report: Report, config_file: str) -> Iterable[str]:
    """What the command prints."""
    counts = ", ".join(f"{split} {report.documents[split]:,}" for split in SPLITS)
    yield (
        f"{config_file}: {report.n_files} files, {report.n_bytes / 1e6:.2f} MB, "
        f"{report.documents.total():,} {report.unit} ({counts}), about "
        f"{report.n_tokens:,.0f} tokens ({report.bytes_per_token:.1f} bytes each)"
    )
    yield (
        f"twice: {report.duplicates:,} of train; also in train: {report.overlap['valid']:,} of "
        f"valid, {report.overlap['test']:,} of test"
    )
    if report.task == "chatlm" and report.n_ctx:
        yield (
            f"long rows: about {report.long_rows:,} are longer than {report.n_ctx} tokens, of "
            f"which {report.cut_tokens:,} tokens are cut"
        )
    elif report.task == "chatlm":
        yield "long rows: unknown until the model is there that the run starts from"
    if report.unread_keys:
        keys = (f"{key} {count:,}" for key, count in report.unread_keys.most_common())
        yield f"keys that nothing reads: {', '.join(keys)}"
    yield from (f"refused: {line}" for line in report.refusals[:SHOWN])
    yield verdict(report)


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "check",
        "Look through the data of a config: how much there is, duplicates, overlap of the splits,\n"
        "long rows, and what training would refuse.",
        "gptchat check --config configs/lm.toml",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    report = check(load_run_config(arguments.config, arguments.overrides))
    print("\n".join(lines_of(report, arguments.config)))
    if report.refusals:
        sys.stdout.flush()
        sys.exit(2)

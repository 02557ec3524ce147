"""Look through the data of a config before training: `gptchat check --config FILE`.

It reads documents and dialogues as training does. It prints how much there is, what occurs twice or
in two splits, how many rows are too long, what training would refuse, and a verdict. Exit status 2
means that training would refuse something.

Documents are duplicates if their texts are equal. Nothing is encoded: tokens are estimated from
bytes. Memory grows by 8 bytes a document.
"""

import json
import math
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gptchat.config import Config, load_run_config
from gptchat.console import CommandParser, Progress, UserError
from gptchat.data.dialogue import TextTurn, excerpts, input_length
from gptchat.data.dialogue_files import TSV, format_of
from gptchat.data.encoding import read_documents
from gptchat.data.reading import PIECE
from gptchat.data.splits import (
    HASHED,
    SPLITS,
    as_number,
    describe_empty,
    hash_of,
    new_hash,
    split_of,
    split_of_dialogue,
    split_patterns,
)
from gptchat.files import expand, matching_files

MANY = 0.01  # share of duplicates or cut rows from which on they are a warning
SHOWN = 20  # lines of refusals
TABLE_ROWS = 1000  # of a TSV, in which a spreadsheet shows
# Names of a spreadsheet's columns.
HEADER = re.compile(
    r"\W*(?:context|response|prompt|completion|question|answer|query|reply|input|output|instruction"
    r"|user|assistant|human|bot|speaker|message|text|turn|utterance|source|target|id|index)"
    r"[\s_]*\w?\W*",
    re.IGNORECASE,
)


@dataclass
class Report:
    task: str
    n_ctx: int  # 0: that of a model that is not there yet
    bytes_per_token: float
    n_files: int = 0
    n_bytes: int = 0  # of the files, compressed or not
    text_bytes: int = 0  # UTF-8 of documents or turns
    entries: Counter[str] = field(default_factory=Counter)  # documents of each of `split_patterns`
    hashes: dict[str, array] = field(default_factory=lambda: {s: array("Q") for s in SPLITS})
    duplicates: int = 0  # documents of train that occur in it before
    overlap: dict[str, int] = field(default_factory=dict)  # documents of the split also in train
    long_rows: int = 0  # dialogues that do not fit into the context
    cut_rows: int = 0  # those of them that lose text
    unread_keys: Counter[str] = field(default_factory=Counter)  # of JSON
    warnings: list[str] = field(default_factory=list)
    refused: dict[str, tuple[str, int]] = field(default_factory=dict)  # kind -> (message, number)

    @property
    def documents(self) -> dict[str, int]:
        return {split: len(hashes) for split, hashes in self.hashes.items()}

    @property
    def unit(self) -> str:
        return "documents" if self.task == "lm" else "dialogues"

    @property
    def refusals(self) -> list[str]:
        """The first message of each kind, and how many more there are."""
        return [
            f"{first} (and {count - 1:,} like it)" if count > 1 else first
            for first, count in self.refused.values()
        ]

    def refuse(self, message: str, place: str = "") -> None:
        """Note what training would refuse; messages of one kind differ in `place` and values."""
        kind = re.sub(r"'[^']*'|\d+", "", message.removeprefix(place))
        first, count = self.refused.get(kind, (message, 0))
        self.refused[kind] = (first, count + 1)

    def add(self, split: str, text_hash: int, n_bytes: int) -> None:
        self.entries[split] += 1
        self.hashes[split.partition("-")[0]].append(text_hash)
        self.text_bytes += n_bytes

    def note_length(self, turns: list[TextTurn], targets: str) -> None:
        """Count a dialogue if it is too long for the context."""
        lengths = [int(len(text.encode()) / self.bytes_per_token) for _, text in turns]
        if self.n_ctx == 0 or input_length(lengths) <= self.n_ctx:
            return
        speakers = [speaker for speaker, _ in turns]
        parts = excerpts(lengths, speakers, self.n_ctx, targets)
        self.long_rows += 1
        self.cut_rows += any(input_length(lengths[i:j]) > self.n_ctx for i, j in parts)


def bytes_per_token(vocab_size: int) -> float:
    """UTF-8 bytes of a token, estimated: in English 2.1 with 512 entries, 4.1 with 8,192."""
    return max(1.0, min(4.4, 2.1 + 0.5 * math.log2(vocab_size / 512)))


def check(config: Config) -> Report:
    ratio = bytes_per_token(config.tokenizer.vocab_size)
    report = Report(config.task, _context(config), ratio)
    files = _find_files(config, report)
    report.n_files = len(files)
    report.n_bytes = sum(path.stat().st_size for _, path in files)
    read = _read_documents if config.task == "lm" else _read_dialogues
    with Progress(report.n_bytes, "check", "B") as bar:
        for split, path in files:
            try:
                read(path, split, config, report)
            except UserError as error:  # the file cannot be read to its end
                report.refuse(str(error), str(path))
            bar.update(path.stat().st_size)
    for split, patterns in split_patterns(config.data).items():
        if report.entries[split] == 0:
            report.refuse(describe_empty(patterns, split, config.data.held_out))
    _compare(report)
    return report


def _find_files(config: Config, report: Report) -> list[tuple[str, Path]]:
    """(the one of `split_patterns` that names it, file) of each file."""
    files: list[tuple[str, Path]] = []
    for split, patterns in split_patterns(config.data).items():
        if config.data.held_out and split in ("valid", "test"):
            continue  # they are drawn from the files of train
        for pattern in patterns:
            try:
                expand([pattern], f"[data] {split.partition('-')[0]}")
            except UserError as error:
                report.refuse(str(error))
        files += [(split, path) for path in matching_files(patterns)]
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
    for text, ends in read_documents(path, config.data.document, PIECE):
        data = text.encode()
        text_hash.update(data)
        n_bytes += len(data)
        if len(beginning) < HASHED:
            beginning += text
        if ends:
            drawn = split_of(beginning[:HASHED], config.data.held_out)
            report.add(split if drawn == "train" else drawn, as_number(text_hash), n_bytes)
            text_hash = new_hash()
            n_bytes = 0
            beginning = ""


def _read_dialogues(path: Path, split: str, config: Config, report: Report) -> None:
    format = format_of(path)
    first_rows: list[list[str]] = []
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
        if len(first_rows) < TABLE_ROWS:
            first_rows.append(texts)
        drawn = split_of_dialogue(texts, config.data.held_out)
        n_bytes = len("".join(texts).encode())
        report.add(split if drawn == "train" else drawn, hash_of("\0".join(texts)), n_bytes)
        report.note_length(turns, config.data.targets)
    if format is TSV and first_rows:
        report.warnings += [f"{path}: {sign}" for sign in spreadsheet_signs(first_rows)]


def spreadsheet_signs(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """What shows that rows are a spreadsheet's."""
    if all(map(HEADER.fullmatch, rows[0])):
        yield f"the first row looks like a header ({', '.join(rows[0])})"
    # Rows count from 0 or 1, the header left out.
    n_numbered = sum(row[0] in (str(i - 1), str(i), str(i + 1)) for i, row in enumerate(rows))
    if 2 * n_numbered > len(rows) > 2:
        yield "the first column numbers the rows"
    n_quoted = sum(any(re.fullmatch('".*"', text, re.DOTALL) for text in row) for row in rows)
    if 2 * n_quoted > len(rows):
        yield 'most rows have a field in quotes ("), which are learned'


def _compare(report: Report) -> None:
    """Count what occurs twice, and warn of it and of cut rows."""
    hashes = {split: np.array(found, np.uint64) for split, found in report.hashes.items()}
    in_train = np.sort(hashes["train"])
    report.duplicates = int((in_train[1:] == in_train[:-1]).sum())
    if report.duplicates > MANY * len(in_train):
        report.warnings.append(f"{report.duplicates:,} duplicates in train")
    for split in ("valid", "test"):
        count = report.overlap[split] = int(np.isin(hashes[split], in_train).sum())
        if count:
            report.warnings.append(f"{count:,} {report.unit} of {split} are in train, too")
    if report.cut_rows > MANY * sum(report.documents.values()):
        report.warnings.append(f"{report.cut_rows:,} rows cut to the context")


def verdict(report: Report) -> str:
    if report.refusals:
        more = f" (and {len(report.refusals) - 1} more)" if len(report.refusals) > 1 else ""
        return f"verdict: training would refuse this: {report.refusals[0]}{more}"
    if report.warnings:
        return f"verdict: fine but for {'; '.join(report.warnings)}"
    return "verdict: fine"


def lines_of(report: Report, config_file: str) -> Iterator[str]:
    n_documents = sum(report.documents.values())
    counts = ", ".join(f"{split} {count:,}" for split, count in report.documents.items())
    n_tokens = report.text_bytes / report.bytes_per_token
    yield (
        f"{config_file}: {report.n_files} files, {report.n_bytes / 1e6:.2f} MB, "
        f"{n_documents:,} {report.unit} ({counts}), about "
        f"{n_tokens:,.0f} tokens ({report.bytes_per_token:.1f} bytes each)"
    )
    yield (
        f"twice: {report.duplicates:,} of train; also in train: {report.overlap['valid']:,} of "
        f"valid, {report.overlap['test']:,} of test"
    )
    if report.task == "chatlm" and report.n_ctx:
        yield (
            f"long rows: about {report.long_rows:,} are longer than {report.n_ctx} tokens, "
            f"{report.cut_rows:,} of them are cut"
        )
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
    arguments = parser.parse_config_and_overrides(argv)
    report = check(load_run_config(arguments.config, arguments.overrides))
    print("\n".join(lines_of(report, arguments.config)))
    if report.refusals:
        sys.stdout.flush()
        sys.exit(2)

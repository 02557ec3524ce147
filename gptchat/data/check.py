"""Look through the data of a config before it is trained on: `gptchat check --config FILE`.

Five lines say how much there is, what occurs twice, what is too long, what looks odd, and whether
training would take it. `--verbose` names places and files, `--json` is for scripts. `gptchat
shards` prints the last line, but not with `--part`.

Promises:
- What training would refuse is found all at once, each with its place; exit status 2. Everything
  else is a warning or a figure; exit status 0.
- Documents or dialogues count as duplicates if they are equal to the character.
- Tokens are estimated: from the characters per token of a sample (SAMPLE characters of each of up
  to SAMPLED_FILES files) if there is a tokenizer, else as 4 bytes each.
- 20 MB/s or more on one core, half of that where rows have 50 bytes; memory for 8 bytes a document.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from gptchat.config import Config, load_run_config
from gptchat.console import CommandParser, Progress, UserError
from gptchat.data import vocabulary
from gptchat.data.scan import FileScan, Finding, scan_file, texts_of
from gptchat.data.splits import SPLITS, empty_splits, patterns_of, split_patterns
from gptchat.files import file_id, matching_files, split_repeats, why_no_file

SAMPLE = 100_000  # characters
SAMPLED_FILES = 10
BYTES_PER_TOKEN = 4  # of UTF-8, where there is no tokenizer yet
MANY = 0.01  # share of duplicates or long rows from which on they are a warning


@dataclass
class Report:
    """What `check` found."""

    task: str
    files: list[FileScan]
    characters_per_token: float
    tokenizer: str  # its folder; "" if there is none yet
    n_ctx: int  # 0: unknown
    documents: dict[str, int] = field(default_factory=dict)  # by split
    duplicates: int = 0  # documents of train that stood in train before
    overlap: dict[str, int] = field(default_factory=dict)  # documents of the split also in train
    warnings: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    @property
    def unit(self) -> str:
        return "documents" if self.task == "lm" else "dialogues"

    @property
    def n_tokens(self) -> float:
        return sum(file.n_characters for file in self.files) / self.characters_per_token

    def total(self, name: str) -> int:
        """The sum of a count over all files."""
        return sum(getattr(file, name) for file in self.files)

    def findings(self, name: str) -> dict[str, Finding]:
        """The `warnings` or `refusals` of all files together."""
        together: dict[str, Finding] = {}
        for file in self.files:
            for kind, finding in getattr(file, name).items():
                joined = together.setdefault(kind, Finding())
                joined.count += finding.count
                joined.places += finding.places
        return together


def check(config: Config) -> Report:
    """Look through all files that the config names for its splits."""
    files, warnings, refusals = _find_files(config)
    paths = [path for _, path in files]
    ratio, tokenizer = _characters_per_token(config, paths)
    report = Report(config.task, [], ratio, tokenizer, _context(config))
    report.warnings = warnings
    report.refusals = refusals
    n_bytes = sum(path.stat().st_size for path in paths)
    with Progress(n_bytes, "check", "B") as bar:
        for split, path in files:
            report.files.append(scan_file(path, split, config, report.n_ctx, ratio))
            bar.update(path.stat().st_size)
    _compare_documents(report)
    _judge(report, config)
    return report


def _find_files(config: Config) -> tuple[list[tuple[str, Path]], list[str], list[str]]:
    """((split, file) of all files, warnings, refusals); split "" where each document has its own.

    A file that several names of one split mean comes once.
    """
    files: list[tuple[str, Path]] = []
    warnings: list[str] = []
    refusals: list[str] = []
    held_out = config.data.held_out > 0
    for split in ("",) if held_out else SPLITS:
        patterns = patterns_of(config.data, split or "train")
        refusals += [
            f"{pattern}: {why_no_file(pattern)}, named by [data] {split or 'train'}"
            for pattern in patterns
            if not matching_files(pattern)
        ]
        named = list(chain.from_iterable(matching_files(pattern) for pattern in patterns))
        distinct, repeated = split_repeats(named)
        if repeated:
            warnings.append(f"{repeated[0]} is named twice by [data] {split or 'train'}, read once")
        files += [(split, path) for path in distinct]
    _, repeated = split_repeats(path for _, path in files)
    splits_of = {str(path): [s for s, other in files if other.samefile(path)] for path in repeated}
    warnings += [f"{name} is in {' and in '.join(splits)}" for name, splits in splits_of.items()]
    return files, warnings, refusals


def _context(config: Config) -> int:
    """The context length, that of the model that the run starts from if need be; 0: unknown."""
    if config.model.n_ctx or not config.init_from:
        return config.model.n_ctx
    try:
        return int(json.loads(Path(config.init_from, "config.json").read_text())["n_positions"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _characters_per_token(config: Config, paths: Sequence[Path]) -> tuple[float, str]:
    """(characters per token in a sample of the files, the folder of the tokenizer, "" if none)."""
    folder = config.init_from or config.tokenizer.dir
    stride = max(1, len(paths) // SAMPLED_FILES)
    text = "\n".join(chain.from_iterable(_sample(path, config) for path in paths[::stride]))
    if not text:
        return float(BYTES_PER_TOKEN), ""
    if vocabulary.find(folder) is None:
        return BYTES_PER_TOKEN * len(text) / len(text.encode(errors="replace")), ""
    from gptchat.data.tokenizer import Tokenizer  # only here: it takes time to load

    return len(text) / max(1, len(Tokenizer.load(folder).encode(text))), folder


def _sample(path: Path, config: Config) -> Iterator[str]:
    """The first SAMPLE characters of a file's documents or turns."""
    n_characters = 0
    try:
        for text in texts_of(path, config):
            yield text[: SAMPLE - n_characters]
            n_characters += len(text)
            if n_characters >= SAMPLE:
                return
    except UserError:  # the scan will say so
        return


def _compare_documents(report: Report) -> None:
    """Count the documents of each split, those that occur twice, and those that train has too."""
    hashes: dict[str, np.ndarray] = {}
    for split in SPLITS:
        arrays = [np.asarray(file.hashes[split]) for file in report.files if split in file.hashes]
        joined = np.concatenate(arrays) if arrays else np.array([], np.uint64)
        report.documents[split] = len(joined)
        hashes[split] = joined
    in_train = hashes["train"]
    in_train.sort()  # in place; np.unique and np.isin would take more time and several copies
    report.duplicates = int((in_train[1:] == in_train[:-1]).sum())
    for split in ("valid", "test"):
        first = np.searchsorted(in_train, hashes[split], "left")
        behind_last = np.searchsorted(in_train, hashes[split], "right")
        report.overlap[split] = int((first < behind_last).sum())


def _count_documents(report: Report, config: Config) -> dict[str, int]:
    """The documents of each split of `split_patterns`."""
    counts: dict[str, int] = {}
    for split, patterns in split_patterns(config.data).items():
        name = split.partition("-")[0]
        named = {file_id(path) for pattern in patterns for path in matching_files(pattern)}
        files = [file for file in report.files if file_id(Path(file.name)) in named]
        counts[split] = sum(len(file.hashes.get(name, ())) for file in files)
    return counts


def _judge(report: Report, config: Config) -> None:
    """Add what follows from the figures to the report's warnings and refusals."""
    for kind, finding in report.findings("refusals").items():
        report.refusals.append(f"{finding.places[0]}" + _and_more(finding.count - 1, kind))
    report.refusals += empty_splits(config.data, _count_documents(report, config))
    if report.duplicates > MANY * report.documents["train"]:
        report.warnings.append(f"{report.duplicates:,} duplicates in train")
    for split, count in report.overlap.items():
        if count:
            report.warnings.append(f"{count:,} {report.unit} of {split} are in train, too")
    if report.total("cut_rows") > MANY * report.total("n_documents"):
        report.warnings.append(f"{report.total('cut_rows'):,} rows cut to the context")
    for kind, finding in report.findings("warnings").items():
        report.warnings.append(_count(finding.count, kind))


def _and_more(count: int, kind: str) -> str:
    return f" (and {count:,} more: {kind})" if count else ""


def _count(count: int, kind: str) -> str:
    """Such as "3 e-mail addresses"."""
    if count == 1:
        return f"1 {kind}"
    plurals = {"e-mail address": "e-mail addresses", "number that looks private": "numbers that"}
    return f"{count:,} {plurals.get(kind, kind + 's')}".replace("that", "that look private")


def verdict(report: Report) -> str:
    """The whole report in a line."""
    if report.refusals:
        more = f" (and {len(report.refusals) - 1} more)" if len(report.refusals) > 1 else ""
        return f"verdict: training would refuse this: {report.refusals[0]}{more}"
    if report.warnings:
        return f"verdict: fine but for {'; '.join(report.warnings)} (`gptchat check --verbose`)"
    return "verdict: fine"


def in_five_lines(report: Report, config_file: str) -> str:
    """What the command prints."""
    n_documents = report.total("n_documents")
    share = report.duplicates / max(1, report.documents["train"])
    source = f"as a sample in {report.tokenizer} has" if report.tokenizer else "no tokenizer yet"
    characters = report.findings("warnings")
    odd = [f"{_count(finding.count, kind)}" for kind, finding in characters.items()]
    long_rows = "long rows: none"
    if report.task == "lm":
        long_rows = "long rows: an LM's windows run across documents, nothing is cut"
    elif report.n_ctx == 0:
        long_rows = "long rows: unknown until the model is there that the run starts from"
    elif report.total("long_rows"):
        long_rows = (
            f"long rows: about {report.total('long_rows'):,} are longer than {report.n_ctx} tokens,"
            f" of which {report.total('cut_tokens'):,} tokens are cut"
        )
    counts = ", ".join(f"{split} {report.documents[split]:,}" for split in SPLITS)
    return "\n".join(
        [
            f"{config_file}: {len(report.files)} files, {report.total('n_bytes') / 1e6:.2f} MB, "
            f"{n_documents:,} {report.unit} ({counts}), about {report.n_tokens:,.0f} tokens "
            f"({report.characters_per_token:.2f} characters each; {source})",
            f"twice: {report.duplicates:,} of train ({share:.1%}) stood there before; also in "
            f"train: {report.overlap['valid']:,} of valid, {report.overlap['test']:,} of test",
            long_rows,
            f"odd: {', '.join(odd) or 'nothing'}",
            verdict(report),
        ]
    )


def details(report: Report) -> Iterator[str]:
    """A line for each file, and for each finding in it."""
    for file in report.files:
        n_tokens = file.n_characters / report.characters_per_token
        yield (
            f"{file.name}: {file.split or 'all splits'}, {file.n_bytes / 1e6:.2f} MB, "
            f"{file.n_documents:,} {report.unit}, about {n_tokens:,.0f} tokens"
        )
        if file.long_rows:
            yield f"  {file.long_rows:,} long rows, about {file.cut_tokens:,} tokens cut"
        for kind, finding in chain(file.refusals.items(), file.warnings.items()):
            yield f"  {finding.count:,} x {kind}: {', '.join(finding.places)}"
    yield from (f"refused: {refusal}" for refusal in report.refusals)


def to_json(report: Report) -> dict[str, Any]:
    values = asdict(report)
    for file in values["files"]:
        del file["hashes"]
    return values | {"n_tokens": round(report.n_tokens)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "check",
        "Look through the data of a config: how much there is, duplicates, overlap of the splits,\n"
        "long rows, odd characters, what looks private, and what training would refuse.",
        "gptchat check --config configs/lm.toml --verbose",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="TOML file")
    parser.add_argument("--verbose", action="store_true", help="places, and figures of each file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    config = load_run_config(arguments.config, arguments.overrides)
    report = check(config)
    if arguments.json:
        print(json.dumps(to_json(report), indent=2))
    else:
        if arguments.verbose:
            print("\n".join(details(report)))
        print(in_five_lines(report, arguments.config))
    if report.refusals:
        sys.stdout.flush()
        sys.exit(2)

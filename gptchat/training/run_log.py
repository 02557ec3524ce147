"""The two logs of a training run, and finding runs. Without torch, so that `gptchat runs` is quick.

- `log.jsonl`: the figures, which depend on the config alone. A line has `step`, `kind` ("train" or
  "valid") and `tokens` (so far), then for "train" `loss` (the mean since the last such line),
  `learning_rate` and `grad_norm`, for "valid" `loss`, `perplexity` and `bits_per_byte`. null stands
  for a number that is not finite.
- `speed.jsonl`: what depends on the machine. A line for each of the other, with the same `step` and
  `kind`, and `minutes`: the time of all processes that trained the run, one after another, without
  their starts and without what a killed one did after its last checkpoint. For "train" also the
  rates.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gptchat.console import UserError
from gptchat.files import atomic_write

LOG = "log.jsonl"
SPEED = "speed.jsonl"
Entry = dict[str, Any]


@dataclass(frozen=True)
class RunLog:
    """What a run has logged so far: the lines of both logs, joined, in the order of steps."""

    folder: Path
    config: dict[str, Any]  # resolved, as in the run's config.json
    entries: list[Entry]

    def of_kind(self, kind: str) -> list[Entry]:
        return [entry for entry in self.entries if entry["kind"] == kind]

    def best(self) -> Entry | None:
        """The evaluation whose model was kept: the first of the lowest loss."""
        measured = [entry for entry in self.of_kind("valid") if entry["loss"] is not None]
        return min(measured, key=lambda entry: entry["loss"], default=None)


def read_run(folder: Path) -> RunLog:
    """Raises UserError for files that are not a run's."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a run's config: {error}") from None
    if not isinstance(config, dict) or "task" not in config:
        raise UserError(f"{path}: found no task; wanted a run's config")
    speed = {(entry["step"], entry["kind"]): entry for entry in read_entries(folder / SPEED)}
    entries = []
    for entry in read_entries(folder / LOG):
        entries.append(speed.get((entry["step"], entry["kind"]), {}) | entry)
    return RunLog(folder, config, entries)


def read_entries(path: Path) -> list[Entry]:
    """The lines of a log, none of one that is not there.

    The last line may be half-written: its process was killed, or is writing it. Raises UserError
    for any other line that is no log's.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    entries = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            entry = json.loads(line)
            entry["step"], entry["kind"]  # noqa: B018
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}:{number}: no line of a training log") from None
        entries.append(entry)
    return entries


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The folders of runs among these and below them, sorted.

    Raises UserError for a folder that is not there, and where there is no run at all.
    """
    runs: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; wanted a run's, or one with runs below it")
        # Not `rglob`, which fails for a folder that goes while it is listed.
        runs |= {Path(name) for name, _, files in os.walk(folder) if LOG in files}
    if not runs:
        names = ", ".join(map(str, folders))
        raise UserError(f"{names}: found no {LOG}; wanted folders that `gptchat train` wrote")
    return sorted(runs)


def _format_line(entry: Entry) -> str:
    return json.dumps(entry) + "\n"


class SpeedLog:
    """Writes `speed.jsonl`, from `step` on: later lines, of steps that are lost, are removed."""

    def __init__(self, folder: Path, step: int):
        """Raises UserError or OSError where the file cannot be read or written."""
        path = folder / SPEED
        kept = [entry for entry in read_entries(path) if entry["step"] <= step]
        self.minutes_before = kept[-1]["minutes"] if kept else 0.0
        with atomic_write(path) as temporary:
            temporary.write_text("".join(map(_format_line, kept)))
        self.file: IO[str] = open(path, "a", encoding="utf-8")
        self.start = time.monotonic()

    def write(self, step: int, kind: str, rates: dict[str, float]) -> None:
        minutes = self.minutes_before + (time.monotonic() - self.start) / 60
        entry = {"step": step, "kind": kind, "minutes": round(minutes, 4)}
        self.file.write(_format_line(entry | rates))
        self.file.flush()

    def close(self) -> None:
        self.file.close()

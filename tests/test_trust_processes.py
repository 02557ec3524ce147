"""Processes that are killed, terminals that close: nothing is lost, nobody is left behind."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import command, start_process, wait_until
from safetensors import safe_open
from test_train import finish, n_reports, start

from gptchat.files import atomic_write, remove_temporary_files

LONG = ("train.num_steps=100000", "train.eval_interval=1000", "train.log_interval=1")
TWO = ("train.gradient_accumulation_steps=2", *LONG)


def children_of(pid: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def saved_step(folder: Path) -> int:
    with safe_open(folder / "checkpoint.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["state"])["step"]


def test_what_an_atomic_write_leaves_when_it_is_killed_is_what_is_removed(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("whole")
        copy = temporary.with_name(temporary.name.replace(str(os.getpid()), "12345"))
        copy.write_text("part")
    (tmp_path / ".mine.tmp").write_text("another's")
    remove_temporary_files(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".mine.tmp", "file"]


@pytest.mark.slow
def test_a_terminal_that_closes_loses_no_step(small: Path, tmp_path: Path) -> None:
    """Each step is evaluated, which prints a line that the terminal no longer takes."""
    terminal, its_end = os.openpty()
    settings = ("train.num_steps=100000", "train.eval_interval=1")
    arguments = command("train", "--config", small / "lm.toml", f"run={tmp_path}", *settings)
    process = start_process(arguments, stdin=its_end, stdout=its_end, stderr=its_end)
    os.close(its_end)
    wait_until(lambda: n_reports(tmp_path) > 0, process, 300)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 130
    assert saved_step(tmp_path) == n_reports(tmp_path)


@pytest.mark.slow
def test_workers_end_with_a_torchrun_that_is_killed(small: Path, tmp_path: Path) -> None:
    process = start(small, "lm", tmp_path, *TWO, processes=2)
    wait_until(lambda: n_reports(tmp_path) > 0, process, 300)
    workers = children_of(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait(60)
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    still_running = [pid for pid in workers if is_running(pid)]
    for pid in still_running:
        os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert not still_running, output
    assert saved_step(tmp_path) > 0, output


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_one_line(small: Path, tmp_path: Path) -> None:
    """That of a run on fresh text, which makes its vocabulary and shards first."""
    fresh = (f"tokenizer.dir={tmp_path}/tokenizer", f"data.shards={tmp_path}/shards")
    process = start(small, "lm", tmp_path / "run", *fresh, *TWO, processes=2)
    wait_until(lambda: n_reports(tmp_path / "run") > 0, process, 300)
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    output = finish(process, 1)
    lines = [line for line in output.splitlines() if "error: process " in line]
    assert len(lines) == 1, output
    assert "another process of the run has ended" in lines[0]
    assert not any("gptchat/train.py" in line for line in output.splitlines()), output

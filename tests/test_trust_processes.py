"""Disks that are full, processes that are killed: one line, nothing lost, nobody left behind."""

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run
from test_train import config_of, finish, start

from gptchat.console import UserError
from gptchat.files import atomic_write, remove_temporary_files
from gptchat.train import Run
from gptchat.training.distributed import World
from gptchat.training.metrics import metrics

LONG = ("train.num_steps=100000", "train.eval_interval=1000", "train.log_interval=1")
TWO = ("train.gradient_accumulation_steps=2", *LONG)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float) -> bool:
    """Whether `condition` holds within `seconds`; it is not waited for once `process` has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return condition()
        time.sleep(0.05)
    return False


def has_logged(folder: Path) -> bool:
    path = folder / "log.jsonl"
    return path.exists() and path.stat().st_size > 0


def children_of(pid: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


# --- full disks


@pytest.mark.parametrize("place", ["log.jsonl", "speed.jsonl", "tensorboard"])
def test_a_log_that_cannot_be_written_is_one_line(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    trained = Run(config_of(small, "lm", tmp_path), World("cpu"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        pytest.raises(UserError, match=f"^[^\n]*{place}: cannot be written[^\n]+$"),
        trained.start_monitor() as monitor,
    ):
        if place != "log.jsonl":
            monitor.log_file = open(os.devnull, "ab")
        if place == "tensorboard":
            monitor.speed_log.file = open(os.devnull, "w")
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        try:
            monitor.report_evaluation(metrics(1.0, 1), False, [])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_in_which_tensorboard_cannot_write_is_one_line(
    small: Path, tmp_path: Path
) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    output = run("train", "--config", small / "lm.toml", f"run={tmp_path}", status=2)
    assert "tensorboard: cannot be written" in output
    assert "Traceback" not in output


# --- what killed processes leave


def test_temporary_files_of_killed_saves_are_removed_at_the_start(
    small: Path, tmp_path: Path
) -> None:
    left = [tmp_path / ".checkpoint.safetensors.99999.tmp"]
    left += [tmp_path / "model" / ".model.safetensors.99999.tmp"]
    other = tmp_path / ".mine.tmp"
    (tmp_path / "model").mkdir()
    for path in (*left, other):
        path.write_bytes(b"part")
    Run(config_of(small, "lm", tmp_path), World("cpu"))
    assert not any(path.exists() for path in left)
    assert other.exists()


def test_what_an_atomic_write_leaves_when_it_is_killed_is_what_is_removed(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("whole")
        copy = temporary.with_name(temporary.name.replace(str(os.getpid()), "12345"))
        copy.write_text("part")
    remove_temporary_files(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


# --- signals, and processes that die


@pytest.mark.slow
def test_a_terminal_that_closes_saves_and_the_same_command_goes_on(
    small: Path, tmp_path: Path
) -> None:
    process = start(small, "lm", tmp_path, *LONG)
    assert wait_until(lambda: has_logged(tmp_path), process, 120)
    process.send_signal(signal.SIGHUP)
    assert "goes on from here" in finish(process, 130)
    assert (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.slow
def test_workers_end_with_a_torchrun_that_is_killed(small: Path, tmp_path: Path) -> None:
    process = start(small, "lm", tmp_path, *TWO, processes=2)
    assert wait_until(lambda: has_logged(tmp_path), process, 180)
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
    process.communicate(timeout=60)
    assert not still_running
    assert (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_one_line(small: Path, tmp_path: Path) -> None:
    process = start(small, "lm", tmp_path, *TWO, processes=2)
    assert wait_until(lambda: has_logged(tmp_path), process, 180)
    workers = children_of(process.pid)
    os.kill(workers[1], signal.SIGKILL)
    output = finish(process, 1)
    lines = [line for line in output.splitlines() if "error: process " in line]
    assert len(lines) == 1, output
    assert "another process of the run has ended" in lines[0]
    assert not any("gptchat/train.py" in line for line in output.splitlines()), output

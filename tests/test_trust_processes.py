"""Disks that are full, processes that are killed: one line, nothing lost, nobody left behind."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import command, run, start_process, wait_until
from safetensors import safe_open
from test_train import config_of, finish, start
from torch.utils.tensorboard import SummaryWriter

from gptchat.console import UserError
from gptchat.files import atomic_write, remove_temporary_files
from gptchat.runtime import SECONDS_TO_REPEAT
from gptchat.train import Run
from gptchat.training import checkpoint
from gptchat.training.distributed import World
from gptchat.training.metrics import metrics

LONG = ("train.num_steps=100000", "train.eval_interval=1000", "train.log_interval=1")
TWO = ("train.gradient_accumulation_steps=2", *LONG)


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


@pytest.fixture
def ended_threads(monkeypatch: pytest.MonkeyPatch) -> list[BaseException | None]:
    """What ended threads, of that which Python prints as a traceback. (pytest keeps it for its
    summary, so that stderr would show nothing.)"""
    ended: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: ended.append(failure.exc_value))
    return ended


@contextmanager
def full_disk() -> Iterator[None]:
    """No file grows beyond 10 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("place", ["log.jsonl", "speed.jsonl", "tensorboard"])
def test_a_log_that_cannot_be_written_is_one_line(
    small: Path, tmp_path: Path, ended_threads: list[BaseException | None], place: str
) -> None:
    trained = Run(config_of(small, "lm", tmp_path), World("cpu"))
    with (
        pytest.raises(UserError, match=f"^[^\n]*{place}: cannot be written[^\n]+$"),
        trained.start_monitor() as monitor,
    ):
        if place != "log.jsonl":
            monitor.log_file = open(os.devnull, "ab")
        if place == "tensorboard":
            monitor.speed_log.file = open(os.devnull, "w")
        with full_disk():
            monitor.report_evaluation(metrics(1.0, 1), False, [])
    assert ended_threads == []


@pytest.mark.parametrize("moment", ["a later report", "the end"])
def test_what_ended_tensorboards_thread_is_told_in_one_line(
    small: Path, tmp_path: Path, ended_threads: list[BaseException | None], moment: str
) -> None:
    """The thread fails between two reports, after the first of them has returned."""
    trained = Run(config_of(small, "lm", tmp_path), World("cpu"))
    with (
        pytest.raises(UserError, match="^[^\n]*tensorboard: cannot be written: File too[^\n]+$"),
        trained.start_monitor() as monitor,
    ):
        before = set(threading.enumerate())
        monitor.board = SummaryWriter(str(tmp_path / "tensorboard"), filename_suffix=".full")
        (writer,) = set(threading.enumerate()) - before
        with full_disk():
            monitor.board.add_text("a", "text", 0)
            writer.join(60)
        if moment == "a later report":
            monitor.report_training(1.0, 1e-3, 1.0)
            pytest.fail("reported")
    assert ended_threads == []


def test_what_ends_another_thread_of_a_run_is_printed(
    small: Path, tmp_path: Path, ended_threads: list[BaseException | None]
) -> None:
    trained = Run(config_of(small, "lm", tmp_path), World("cpu"))
    hook = threading.excepthook
    with trained.start_monitor():
        thread = threading.Thread(target=lambda: [][0])
        thread.start()
        thread.join(60)
    (error,) = ended_threads
    assert isinstance(error, IndexError) and threading.excepthook is hook


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


def test_files_that_another_run_is_writing_are_not_removed(small: Path, tmp_path: Path) -> None:
    being_written = tmp_path / ".checkpoint.safetensors.99999.tmp"
    with checkpoint.lock(tmp_path):
        being_written.write_bytes(b"part")
        with pytest.raises(UserError, match="another run is training here"):
            Run(config_of(small, "lm", tmp_path), World("cpu"))
    assert being_written.exists()


def test_what_an_atomic_write_leaves_when_it_is_killed_is_what_is_removed(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("whole")
        copy = temporary.with_name(temporary.name.replace(str(os.getpid()), "12345"))
        copy.write_text("part")
    remove_temporary_files(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


# --- signals, and processes that die


# The main thread waits in C for a lock that it holds: Python's signal handlers do not run.
HANG = """
import ctypes
from gptchat.runtime import on_stop_signals
on_stop_signals(lambda: print("asked to stop", flush=True))
lock = ctypes.CDLL(None).pthread_mutex_lock
mutex = ctypes.create_string_buffer(64)
lock(mutex)
print("hangs", flush=True)
lock(mutex)
"""


def test_a_signal_that_is_repeated_later_ends_a_process_that_hangs() -> None:
    process = start_process([sys.executable, "-c", HANG], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == "hangs\n"
    for number in (signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        assert process.stdout.readline() == "asked to stop\n"
    time.sleep(SECONDS_TO_REPEAT)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_terminal_that_closes_during_an_evaluation_loses_no_step(
    small: Path, tmp_path: Path
) -> None:
    """Each step is evaluated, which prints a line that the terminal no longer takes."""
    terminal, its_end = os.openpty()
    settings = ("train.num_steps=100000", "train.eval_interval=1")
    arguments = command("train", "--config", small / "lm.toml", f"run={tmp_path}", *settings)
    process = start_process(arguments, stdin=its_end, stdout=its_end, stderr=its_end)
    os.close(its_end)
    wait_until(lambda: has_logged(tmp_path), process, 300)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 130
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["state"])["step"] == last["step"]


@pytest.mark.slow
def test_workers_end_with_a_torchrun_that_is_killed(small: Path, tmp_path: Path) -> None:
    process = start(small, "lm", tmp_path, *TWO, processes=2)
    wait_until(lambda: has_logged(tmp_path), process, 300)
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
    assert (tmp_path / "checkpoint.safetensors").exists(), output


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_one_line(small: Path, tmp_path: Path) -> None:
    process = start(small, "lm", tmp_path, *TWO, processes=2)
    wait_until(lambda: has_logged(tmp_path), process, 300)
    workers = children_of(process.pid)
    os.kill(workers[1], signal.SIGKILL)
    output = finish(process, 1)
    lines = [line for line in output.splitlines() if "error: process " in line]
    assert len(lines) == 1, output
    assert "another process of the run has ended" in lines[0]
    assert not any("gptchat/train.py" in line for line in output.splitlines()), output

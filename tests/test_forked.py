"""A process that the tests fork is like one that they start."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from conftest import command, run_process, start_process

from tests.forked import Forked

MISTAKES = [("paths", "--lm", "missing.toml"), ("tarin",), ("train", "--help"), ("check",)]


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_it_prints_the_same_and_ends_with_the_same_status(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = subprocess.run(command(*words), capture_output=True, text=True, timeout=60)
    forked = run_process(command(*words), timeout=60)
    assert forked.returncode == started.returncode
    assert (forked.stdout, forked.stderr) == (started.stdout, started.stderr)


def test_it_ends_by_the_signal_that_it_is_sent(small, tmp_path):
    words = command(
        "train", "--config", small / "lm.toml", f"run={tmp_path}", "train.num_steps=9999"
    )
    process = start_process(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert isinstance(process, Forked)
    assert process.stderr and process.stderr.readline() and process.poll() is None
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_thread_that_waits_does_not_keep_another_from_ending_it(small, tmp_path):
    words = command(
        "train", "--config", small / "lm.toml", f"run={tmp_path}", "train.num_steps=9999"
    )
    process = start_process(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    waiting = threading.Thread(target=process.wait)
    waiting.start()
    process.kill()
    waiting.join(60)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("time", ["once", "again"])
def test_a_variable_that_a_test_sets_ends_with_it(time):
    assert Forked.can_run(command("train", "--help"), {})
    os.environ["TORCH_SET_BY_A_TEST"] = time


def test_what_is_read_at_the_start_of_a_process_needs_one_that_is_started(monkeypatch):
    words = command("train", "--help")
    assert Forked.can_run(words, {})
    assert not Forked.can_run(words, {"preexec_fn": os.setsid})
    assert not Forked.can_run([sys.executable, "-c", ""], {})
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert not Forked.can_run(words, {})

"""What a process that hangs can be asked."""

import signal
import subprocess
import time

import pytest
import torch
from conftest import command

torch.set_num_threads(1)
MARK = "Thread MainThread (most recent call last)"


@pytest.mark.slow
def test_trainer_prints_its_threads_on_sigusr1_and_goes_on(small, tmp_path):
    overrides = ["train.num_steps=100000", "train.eval_interval=100000", "train.log_interval=1"]
    process = subprocess.Popen(
        command("train", "--config", small / "lm.toml", f"run={tmp_path}", *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = iter(process.stdout.readline, "")
    try:
        assert any("step" in line for line in lines)
        for _ in range(100):  # each of them could find the threads at a bad moment
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.02)
        assert any(MARK in line for line in lines)
        assert any("train.py" in line for line in lines)
        assert any("step" in line for line in lines)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait(timeout=60)

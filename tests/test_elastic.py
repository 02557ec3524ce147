"""torchrun on two agents, as on two machines: one comes later and is killed, and the run goes on.

Each agent has one process of a tiny model. They meet on 127.0.0.1 and share the run's folder.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import command, scalars, start_process, wait_until
from test_train import finish, n_reports, trained
from test_trust_processes import children_of

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
SETTINGS = ["train.gradient_accumulation_steps=2", "train.eval_interval=20"]
SETTINGS += ["train.log_interval=1", "model.dropout=0", "train.warmup_ratio=0"]
SETTINGS += ["train.schedule=constant"]
# 0.1 s a step: the test repeats all steps that a run takes while its processes start.
SLOW_TRAINING = """
import time

from gptchat import train
from gptchat.console import cli

step = train.train_step
train.train_step = lambda *arguments: (time.sleep(0.1), step(*arguments))[1]
cli(train.main)
"""


class Agents:
    """Starts torchrun agents of one run; the first one keeps the store where they meet."""

    def __init__(self, small: Path, folder: Path, n_steps: int):
        self.folder = folder
        program = folder / "train.py"
        program.write_text(SLOW_TRAINING)
        self.arguments = [str(program), "--config", str(small / "lm.toml"), f"run={folder / 'run'}"]
        self.arguments += [*SETTINGS, f"train.num_steps={n_steps}"]
        self.started: list[subprocess.Popen] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.endpoint = f"127.0.0.1:{probe.getsockname()[1]}"

    def start(self) -> subprocess.Popen:
        options = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3"]
        options += ["--rdzv-backend", "c10d", "--rdzv-id", "test", "--local-addr", "127.0.0.1"]
        options += ["--rdzv-endpoint", self.endpoint]
        # The time limits are short, so that the test is: how long a silent agent counts as there,
        # and how long those who have met wait for more.
        conf = f"is_host={not self.started},keep_alive_interval=1,last_call_timeout=2"
        options += ["--rdzv-conf", conf]
        agent = start_process(
            [sys.executable, "-m", "torch.distributed.run", *options, *self.arguments],
            stdout=open(self.folder / f"agent-{len(self.started)}.log", "w"),
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )
        self.started.append(agent)
        return agent

    def wait_for_reports(self, number: int) -> None:
        """Wait until the first agent's run has written this many more lines of its log."""
        run = self.folder / "run"
        wanted = n_reports(run) + number
        wait_until(lambda: n_reports(run) >= wanted, self.started[0], 300)

    def wait_for_processes(self, number: int) -> None:
        """Wait until the first agent's run goes on with this many processes."""
        wait_until(lambda: self.n_processes() == number, self.started[0], 300)

    def n_processes(self) -> int:
        """The number of processes that the first agent's worker was told; 0 between two."""
        for pid in children_of(self.started[0].pid):
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                sizes = [word for word in environment if word.startswith(b"WORLD_SIZE=")]
                return int(sizes[0].split(b"=")[1]) if sizes else 0
        return 0

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("agent-*.log")))


def test_a_run_goes_on_when_an_agent_joins_it_and_when_that_one_is_killed(
    small: Path, tmp_path: Path
) -> None:
    agents = Agents(small, tmp_path, n_steps=100_000)
    first = agents.start()
    agents.wait_for_reports(5)
    second = agents.start()
    agents.wait_for_processes(2)
    agents.wait_for_reports(25)  # more than `eval_interval`: a checkpoint of both
    second.kill()
    agents.wait_for_processes(1)
    agents.wait_for_reports(5)
    first.send_signal(signal.SIGTERM)
    first.wait(60)

    losses = scalars(tmp_path / "run", "train/loss")
    assert [step for step, _ in losses] == list(range(1, len(losses) + 1)), agents.output()
    # However many processes there were: each step had the batches of an undisturbed run.
    trained(small, "lm", tmp_path / "alone", *SETTINGS, f"train.num_steps={len(losses)}")
    alone = scalars(tmp_path / "alone", "train/loss")
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in alone], rel=1e-3)


def test_processes_with_folders_of_their_own_are_refused_in_one_line(
    small: Path, tmp_path: Path
) -> None:
    """Two machines whose folder `run` is not shared: the second one would begin anew."""
    begun = [*SETTINGS, "train.num_steps=20"]
    trained(small, "lm", tmp_path / "0", *begun)
    arguments = command("train", "--config", small / "lm.toml", *SETTINGS, "train.num_steps=40")
    shell = f'exec "$@" run={tmp_path}/$RANK'
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", "2", "--no-python", "sh", "-c", shell, "sh"]
    process = start_process(
        [*launch, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output = finish(process, 1)
    assert "process 0 of 2 found the run at step 20, process 1 at step 0" in output, output
    assert "gptchat/train.py" not in output, output

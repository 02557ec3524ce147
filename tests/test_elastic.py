"""torchrun on two agents, as on two machines: one is killed and comes back, and the run goes on.

Each agent has one process of a tiny model. They meet on 127.0.0.1 and share the run's folder.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command, start_process, wait_until
from test_train import config_of, finish, start
from test_trust_processes import children_of

from gptchat.data.batches import Batch
from gptchat.train import Run
from gptchat.training.distributed import World

pytestmark = pytest.mark.slow
SETTINGS = ["train.gradient_accumulation_steps=2", "train.eval_interval=50"]
SETTINGS += ["train.log_interval=1", "model.dropout=0"]


class Agents:
    """Starts torchrun agents of one run; the first one keeps the store where they meet."""

    def __init__(self, small: Path, folder: Path, n_steps: int):
        self.folder = folder
        self.arguments = command("train", "--config", small / "lm.toml", f"run={folder / 'run'}")
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
            [sys.executable, "-m", "torch.distributed.run", *options, *self.arguments[1:]],
            stdout=open(self.folder / f"agent-{len(self.started)}.log", "w"),
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )
        self.started.append(agent)
        return agent

    def log(self) -> list[dict[str, Any]]:
        """The training lines of the run's log, in its order."""
        path = self.folder / "run/log.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [line for line in map(json.loads, lines) if line["kind"] == "train"]

    def wait_for_step(self, step: int) -> None:
        """Wait until the first agent's run has made a step."""
        wait_until(lambda: self.log() and self.log()[-1]["step"] >= step, self.started[0], 300)

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


LONG = pytest.mark.skipif(
    "GPTCHAT_LONG" not in os.environ, reason="torch waits for minutes; GPTCHAT_LONG=1 runs it"
)


@pytest.mark.parametrize(
    "how",
    [
        "the agent",
        pytest.param("the machine", marks=LONG),
        pytest.param("asked to stop", marks=LONG),
    ],
)
def test_a_run_goes_on_when_an_agent_is_killed_and_when_it_comes_back(
    small: Path, tmp_path: Path, how: str
) -> None:
    agents = Agents(small, tmp_path, n_steps=100_000)
    first, second = agents.start(), agents.start()
    agents.wait_for_processes(2)
    agents.wait_for_step(120)

    workers = children_of(second.pid)
    second.send_signal(signal.SIGTERM if how == "asked to stop" else signal.SIGKILL)
    if how == "the machine":
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
    agents.wait_for_processes(1)
    alone = agents.log()[-1]["step"]
    agents.wait_for_step(alone + 50)

    third = agents.start()
    agents.wait_for_processes(2)
    together = agents.log()[-1]["step"]
    agents.wait_for_step(together + 50)
    for agent in (first, third):
        agent.send_signal(signal.SIGTERM)
    for agent in (first, third):
        agent.wait(60)

    steps = [line["step"] for line in agents.log()]
    assert steps == list(range(1, len(steps) + 1)), agents.output()  # none twice, none left out
    # A worker whose agent alone is killed or leaves saves its last step; one that is killed cannot.
    lost = "another process of the run has ended" in agents.output()
    assert lost == (how == "the machine"), agents.output()
    assert_losses_are_those_of_one_process(small, tmp_path, agents.log())


def assert_losses_are_those_of_one_process(
    small: Path, folder: Path, log: list[dict[str, Any]]
) -> None:
    """However many processes there were: each step had the batches of an undisturbed run."""
    settings = [*SETTINGS, "train.num_steps=100000"]
    run = Run(config_of(small, "lm", folder / "undisturbed", *settings), World("cpu"))
    plain_step = run.step

    def step(micro_batches: list[Batch]) -> torch.Tensor:
        if run.state.step + 1 == len(log):
            run.stop()
        return plain_step(micro_batches)

    run.step = step  # type: ignore[method-assign]
    run.train()
    lines = (folder / "undisturbed/log.jsonl").read_text().splitlines()
    undisturbed = [line for line in map(json.loads, lines) if line["kind"] == "train"]
    assert [line["tokens"] for line in log] == [line["tokens"] for line in undisturbed]
    losses = [line["loss"] for line in undisturbed]
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=1e-3)


def test_processes_with_folders_of_their_own_are_refused_in_one_line(
    small: Path, tmp_path: Path
) -> None:
    """Two machines whose folder `run` is not shared: the second one would begin anew."""
    begun = [*SETTINGS, "train.num_steps=20", "train.eval_interval=20"]
    finish(start(small, "lm", tmp_path / "0", *begun))
    arguments = command("train", "--config", small / "lm.toml", *SETTINGS, "train.num_steps=40")
    shell = f'exec "$@" run={tmp_path}/$RANK'
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", "2", "--no-python", "sh", "-c", shell, "sh"]
    process = start_process(
        [*launch, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    output = finish(process, 1)
    assert "process 0 of 2 found the run at step 20, process 1 at step 0" in output, output
    assert "gptchat/train.py" not in output, output

"""configs/cluster/train.slurm, with stand-ins for srun, scontrol and scancel.

configs/cluster/README.md says what a real Slurm did. (tests/test_nginx.py: nginx.)
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import start_process
from serving import ROOT
from torch.distributed.run import get_args_parser

SLURM = ROOT / "configs/cluster/train.slurm"
ENVIRONMENT = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
}
STAND_INS = {
    "scontrol": 'echo "scontrol $*" >> calls; echo n1; echo n2',
    "scancel": 'echo "scancel $*" >> calls; kill -TERM "$(cat srun.pid)"',
    # Each machine's task, one after the other; then it waits, if the test says so, to be cancelled.
    "srun": """
    trap 'exit 143' TERM
    echo $$ > srun.pid
    for id in 0 1; do SLURM_NODEID=$id SLURMD_NODENAME=n$((id + 1)) "$@"; done
    while [ -e wait ]; do sleep 0.05; done""",
    "python": f"""
    exec "{sys.executable}" -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@\"""",
}


def stand_ins(folder: Path) -> dict[str, str]:
    """An environment in which commands of a cluster are scripts in `folder`."""
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return os.environ | ENVIRONMENT | {"PATH": path, "PYTHON": str(folder / "python")}


def test_the_slurm_script_passes_shellcheck() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True, timeout=60)
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck")
    done = subprocess.run(["shellcheck", SLURM], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_slurm_script_starts_an_agent_on_each_machine(tmp_path: Path) -> None:
    arguments = ["my configs/lm.toml", "train.seed=3", 'data.train=["a b.txt"]']
    done = subprocess.run(
        ["bash", SLURM, *arguments],
        cwd=tmp_path,
        env=stand_ins(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    first, second = [json.loads(line) for line in done.stdout.splitlines()]
    assert first[:2] == second[:2] == ["-m", "torch.distributed.run"]
    options = [get_args_parser().parse_args(words[2:]) for words in (first, second)]
    for given in options:
        assert (given.nnodes, given.nproc_per_node) == ("2", "4")
        assert (given.rdzv_endpoint, given.rdzv_id) == ("n1:20007", "7")
        assert given.training_script_args == ["train", "--config", *arguments]
    assert [given.rdzv_conf for given in options] == ["is_host=1", "is_host=0"]
    assert [given.local_addr for given in options] == ["n1", "n2"]


def test_a_slurm_job_that_is_told_its_time_is_over_saves_and_queues_again(tmp_path: Path) -> None:
    (tmp_path / "wait").touch()
    job = start_process(
        ["bash", str(SLURM)], cwd=tmp_path, env=stand_ins(tmp_path), stdout=subprocess.PIPE
    )
    assert job.stdout and job.stdout.readline() and job.stdout.readline()  # both agents
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 128 + signal.SIGTERM
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[-2:] == ["scancel --signal=TERM 7.0", "scontrol requeue 7"]

"""configs/cluster: what it holds is valid, and starts what it says. (tests/test_nginx.py: nginx.)

Without Kubernetes and Slurm: schemas, shellcheck, and the commands with stand-ins for srun and
scontrol. configs/cluster/README.md says what a real Slurm did.
"""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from conftest import start_process
from serving import ROOT, Server, configs, tiny_model
from torch.distributed.run import get_args_parser

CLUSTER = ROOT / "configs/cluster"
SLURM = CLUSTER / "train.slurm"
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
    "python": f'exec {sys.executable} -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"',
}


def documents(name: str) -> dict[str, dict]:
    """The resources in a file, by their kind."""
    resources = yaml.safe_load_all((CLUSTER / name).read_text())
    return {resource["kind"]: resource for resource in resources}


def stand_ins(folder: Path) -> dict[str, str]:
    """An environment in which commands of a cluster are scripts in `folder`."""
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return os.environ | ENVIRONMENT | {"PATH": path, "PYTHON": str(folder / "python")}


@pytest.mark.parametrize("name", ["train.yaml", "serve.yaml"])
def test_the_manifests_fit_the_schemas_of_kubernetes(name: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate")
    for resource in documents(name).values():
        schemas.validate(resource, schemas.latest_version(), strict=True)


def test_labels_ports_volumes_and_names_in_the_manifests_agree() -> None:
    serve, train = documents("serve.yaml"), documents("train.yaml")
    pod = serve["Deployment"]["spec"]["template"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert serve[kind]["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    assert serve["Service"]["spec"]["selector"] == pod["metadata"]["labels"]
    assert (
        serve["PodDisruptionBudget"]["spec"]["minAvailable"]
        < serve["Deployment"]["spec"]["replicas"]
    )
    job = train["Job"]["spec"]
    assert job["template"]["spec"]["subdomain"] == train["Service"]["metadata"]["name"]
    claim = train["PersistentVolumeClaim"]["metadata"]["name"]
    for spec in (pod["spec"], job["template"]["spec"]):
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounts == volumes.keys()
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim


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


def test_the_jobs_command_is_one_of_torchrun(tmp_path: Path) -> None:
    (container,) = documents("train.yaml")["Job"]["spec"]["template"]["spec"]["containers"]
    environment = stand_ins(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "python").rename(tmp_path / "bin/torchrun")
    for index in ("0", "1"):
        done = subprocess.run(
            [*container["command"], *container["args"]],
            env=environment
            | {"VENV": str(tmp_path), "JOB_COMPLETION_INDEX": index, "POD_IP": "10.0.0.7"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        given = get_args_parser().parse_args(json.loads(done.stdout))
        assert given.nnodes == "1:2" and given.local_addr == "10.0.0.7"
        assert given.rdzv_conf == f"is_host={int(index == '0')}"
        config = given.training_script_args[given.training_script_args.index("--config") + 1]
        assert (ROOT / config).is_file()


@pytest.mark.server
def test_the_deployments_command_serves_and_is_ready_also_when_it_is_busy(tmp_path: Path) -> None:
    (container,) = documents("serve.yaml")["Deployment"]["spec"]["template"]["spec"]["containers"]
    settings = config_map(tmp_path / "map", configs(tmp_path / "configs", slots=1, max_requests=1))
    model = tiny_model(tmp_path / "model", "chatlm", n_embd=128, n_layer=4, n_positions=1024)
    given = dict(word.removeprefix("--").split("=", 1) for word in container["args"])
    assert given["host"] == "0.0.0.0" and given["port"] == "8080"
    name = given["model"].partition("=")[0]
    server = Server(
        tmp_path / "run", {name: model}, f"--configs={settings}", f"--host={given['host']}"
    )
    try:
        server.wait_until_ready()
        long = {"prompt": "good", "max_tokens": 900, "min_tokens": 900}
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(server.post, f"{name}/1.0/v1/completions", long)
            deadline = time.monotonic() + 60
            while not server.is_busy():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert server.post(f"{name}/1.0/v1/completions", {"prompt": "a"})[0] == 503
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert ask(server, container[probe]) == 200
            assert not answer.done()
    finally:
        server.stop()


def ask(server: Server, probe: dict) -> int:
    """The status that a kubelet gets, which calls a pod by its address."""
    seconds = probe["timeoutSeconds"]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=seconds)
    connection.request("GET", probe["httpGet"]["path"], headers={"host": "10.0.0.7:8080"})
    return connection.getresponse().status


def config_map(folder: Path, source: Path) -> Path:
    """A folder as Kubernetes mounts a ConfigMap: links to links, read-only."""
    folder.mkdir()
    shutil.copytree(source, folder / "..2026")
    (folder / "..data").symlink_to("..2026")
    for path in source.iterdir():
        (folder / path.name).symlink_to(f"..data/{path.name}")
    (folder / "..2026").chmod(0o555)
    return folder

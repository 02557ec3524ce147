"""The wheel: built, installed without a checkout, and used as a person would."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from serving import ROOT, Server, tiny_model

pytestmark = pytest.mark.slow
TINY = ["model.n_layer=1", "model.n_head=2", "model.n_embd=32", "model.n_ctx=32"]
TINY += ["train.num_steps=2", "train.batch_size=2", "train.precision=fp32"]


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git knows, since setuptools builds beside its source."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    pip("wheel", "--no-deps", "--wheel-dir", folder, folder / "source")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it; what it depends on is found as usual."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--target", folder, wheel)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder to work in."""
    return tmp_path_factory.mktemp("home")


def run(site: Path, home: Path, *arguments: object, status: int = 0) -> str:
    """Run the installed `gptchat` in `home`; stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "gptchat", *map(str, arguments)],
        cwd=home,
        env=os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_wheel_installs_the_package_gptchat_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"gptchat", "gptchat-1.0.0.dist-info"}
    for name in (
        "_handlers/page/page.html",
        "_configs/gpt2-small/lm.toml",
        "_configs/prompts.tsv",
        "_configs/serve/jvm.options",
        "_configs/cluster/nginx.conf",
    ):
        assert f"gptchat/{name}" in names


def test_corpora_tokenizer_shards_and_a_run_with_the_default_configs(
    site: Path, home: Path
) -> None:
    assert "data/lm/conversations.txt" in run(site, home, "corpora")
    config = ("--config", "configs/lm.toml")
    told = run(site, home, "tokenizer", *config, "tokenizer.vocab_size=300")
    assert "configs/lm.toml: not in this folder; gptchat's own is used\n" in told
    small = ['data.train=["data/lm/valid.txt"]', "data.weights=[]", "tokenizer.vocab_size=300"]
    small += ['data.valid=["data/lm/chat-valid.txt"]', "data.test=[]"]
    run(site, home, "shards", *config, *small)
    assert "held-out loss" in run(site, home, "train", *config, *small, *TINY)
    assert (home / "out/lm/model/model.safetensors").is_file()


def test_a_config_in_the_working_folder_comes_first(site: Path, home: Path) -> None:
    (home / "configs").mkdir()
    (home / "configs/lm.toml").write_text("nonsense = 1")
    told = run(site, home, "train", "--config", "configs/lm.toml", status=2)
    assert told.startswith("error: configs/lm.toml: nonsense: unknown key")
    told = run(site, home, "train", "--config", "configs/ml.toml", status=2)
    assert told.startswith("error: configs/ml.toml: cannot be read: No such file")


def test_make_setup_says_which_python_it_wants(tmp_path: Path) -> None:
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\nexit 1\n")  # as Python does where it is asked whether it is too old
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert f"error: PYTHON={old}: wanted Python 3.11 or newer\n" in done.stderr


@pytest.mark.server
def test_the_installed_server_answers(site: Path, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "chatlm", ends=False)
    environment = {"PYTHONPATH": str(site)}
    server = Server(tmp_path / "run", {"chatlm": model}, environment=environment, cwd=tmp_path)
    try:
        server.wait_until_ready()
        status, answer = server.post("chatlm", {"context": "good morning", "n": 1})
        assert status == 200 and answer["response"]
    finally:
        server.stop()

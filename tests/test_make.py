"""`make` in a person's own folder: it does what the configs say, once, and spares own files."""

import gzip
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run

from gptchat.data import corpora
from gptchat.data.dialogue_files import read_prompts

ROOT = Path(__file__).resolve().parent.parent
# Commands that make runs are noted, and run unless they are stubs.
PYTHON = """#!/bin/sh
[ "$1 $2" = "-m gptchat" ] && echo "$*" >> commands.log
case "$3" in
{stubs}
esac
exec env PYTHONPATH={root} {python} "$@"
"""
STUBS = 'train|evaluate|tokenizer|chat|serve) [ -f "$5" ] || exit 2; exit 0;;'
# Stands for `python3.11 -m venv FOLDER`: pip does nothing.
MAKE_VENV = """#!/bin/sh
mkdir -p "$3/bin"
cat > "$3/bin/python" <<'END'
{python}END
printf '#!/bin/sh\\n' > "$3/bin/pip"
chmod +x "$3/bin/python" "$3/bin/pip"
"""
LM = """
run = "out/bard"
[tokenizer]
dir = "out/bard-tokenizer"
vocab_size = 300
files = ["mine/*.txt", "mine/*.gz"]
[data]
train = ["mine/*.txt", "mine/*.gz"]
valid = ["held/valid.txt"]
test = ["held/test.txt"]
shards = "out/bard-shards/lm"
[model]
n_layer = 1
n_head = 1
n_embd = 16
n_ctx = 32
[train]
num_steps = 2
batch_size = 2
"""
CHATLM = """
task = "chatlm"
run = "out/bard-chat"
init_from = "out/bard/model"
[data]
train = ["talks/*.tsv"]
valid = ["held/valid.tsv"]
test = ["held/test.tsv"]
shards = "out/bard-shards/chatlm"
[train]
num_steps = 2
batch_size = 2
"""
BARD = "CONFIGS=configs/bard"


class Project:
    """A folder with a set-up of its own, own text and dialogues, and configs in configs/bard."""

    def __init__(self, folder: Path, stubs: str):
        self.folder = folder
        self.log = folder / "commands.log"
        self.python = PYTHON.format(root=ROOT, python=sys.executable, stubs=stubs)
        self.write("pyproject.toml", "")
        self.write("configs/constraints.txt", "")
        self.write("configs/prompts.tsv", "Hi!\n")
        self.write("venv/bin/python", self.python)
        (folder / "venv/bin/python").chmod(0o755)
        for stamp in (".base", ".serve"):
            self.write(f"venv/{stamp}", "")
        text = "To be, or not to be, that is the question.\n\nWho is there? Nay, answer me.\n\n" * 9
        for name in ("mine/a.txt", "mine/two words.txt", "held/valid.txt", "held/test.txt"):
            self.write(name, text + name)
        (folder / "mine/c.txt.gz").write_bytes(gzip.compress(text.encode()))
        for name in ("talks/a.tsv", "held/valid.tsv", "held/test.tsv"):
            self.write(name, f"Who is there?\tNay, answer me: {name}.\n" * 9)
        self.write("configs/bard/lm.toml", LM)
        self.write("configs/bard/chatlm.toml", CHATLM)

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def make(self, *arguments: str, status: int = 0) -> str:
        """Run make and return what it prints. Its exit status must be `status`."""
        self.log.write_text("")
        command = ["make", "-f", str(ROOT / "Makefile"), "VENV=venv", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
            environment.pop(name, None)  # of a make that runs the tests
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def commands(self) -> list[str]:
        """The commands that the last make ran, each with its config."""
        lines = self.log.read_text().splitlines()
        return [line.removeprefix("-m gptchat ").replace("--config ", "") for line in lines]

    def states(self) -> dict[Path, int]:
        """When each file was written."""
        paths = [path for path in self.folder.rglob("*") if path.is_file() and path != self.log]
        return {path: path.stat().st_mtime_ns for path in paths}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path, STUBS)


def test_make_follows_the_configs(project: Project) -> None:
    project.make("tokenizer", "lm", BARD)
    assert project.commands == [
        "tokenizer configs/bard/lm.toml",
        "tokenizer configs/bard/chatlm.toml",
        "train configs/bard/lm.toml",
        "evaluate configs/bard/lm.toml",
    ]
    project.make("chatlm", "LM=configs/bard/lm.toml", "CHATLM=configs/bard/chatlm.toml")
    assert project.commands == [
        "train configs/bard/lm.toml",
        "evaluate configs/bard/lm.toml",
        "train configs/bard/chatlm.toml",
        "evaluate configs/bard/lm.toml",
        "evaluate configs/bard/chatlm.toml --prompts configs/prompts.tsv",
    ]


def test_a_chatlm_can_do_without_an_lm_and_has_prompts_of_its_own(project: Project) -> None:
    (project.folder / "configs/bard/lm.toml").unlink()
    project.write("configs/bard/prompts.tsv", "Who is there?\n")
    project.make("chatlm", BARD)
    assert project.commands == [
        "train configs/bard/chatlm.toml",
        "evaluate configs/bard/chatlm.toml --prompts configs/bard/prompts.tsv",
    ]


@pytest.mark.parametrize("target", ["tokenizer", "lm", "chatlm", "chat", "evaluate"])
def test_a_missing_config_is_an_error(project: Project, target: str) -> None:
    shutil.rmtree(project.folder / "configs/bard")
    project.make(target, BARD, status=2)
    assert len(project.commands) == 1


def test_chat_and_serve_take_the_models_of_these_configs(project: Project) -> None:
    configs = "configs/bard/lm.toml configs/bard/chatlm.toml"
    project.make("chat", BARD)
    assert project.commands == ["chat configs/bard/chatlm.toml"]
    project.make("mar", "serve", BARD)
    archive, serve = project.commands
    assert archive == f"serve {configs} --archive-only"
    assert serve == f"serve {configs} --host 127.0.0.1"
    project.make("serve", BARD, "ARGS=--model configs/bard/lm.toml")
    assert project.commands == ["serve --model configs/bard/lm.toml --host 127.0.0.1"]


def test_the_set_up_comes_first_where_there_is_none(project: Project) -> None:
    shutil.rmtree(project.folder / "venv")
    project.write("python", MAKE_VENV.replace("{python}", project.python))
    (project.folder / "python").chmod(0o755)
    output = project.make("lm", "PYTHON=./python", BARD)
    assert output.index("venv/bin/pip") < output.index("gptchat train")


def test_the_prompts_of_our_configs_are_one_turn_each() -> None:
    prompts = list(read_prompts(ROOT / "configs/prompts.tsv"))
    assert [len(prompt.turns) for prompt in prompts] == [1] * 10


def test_the_names_of_the_default_corpora_are_those_that_are_written(small: Path) -> None:
    written = [path for path in (small / "whole").rglob("*") if path.is_file()]
    names = {f"data/{path.relative_to(small / 'whole')}" for path in written}
    assert names == set(corpora.FILES)


def test_default_corpora_are_written_only_if_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(corpora, "write_corpora", written.append)
    monkeypatch.chdir(tmp_path)
    corpora.write_missing(["**/*.txt", "data/*.txt", "data/lm/*.txt", "./mine.txt"])
    assert not written
    corpora.write_missing(["mine.txt", "data/lm/test.txt"])
    assert written == [Path("data")]


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Project]:
    """A project in which every command is the real one."""
    yield Project(tmp_path, stubs="")


@pytest.mark.slow
def test_real_runs_from_own_files_and_what_happens_when_they_change(real: Project) -> None:
    before = real.states()
    output = real.make("tokenizer", "lm", "chatlm", BARD)
    lm, chatlm = real.folder / "out/bard/test.txt", real.folder / "out/bard-chat/test.txt"
    answers = (real.folder / "out/bard-chat/answers.tsv").read_text().splitlines()
    assert lm.read_text().startswith("held/test.txt: loss")
    assert chatlm.read_text().startswith("held/test.tsv: loss")
    assert len(answers) == 1 and answers[0].startswith("Hi!\t")
    assert "out/bard: not evaluated again" in output  # before chatlm's figures: lm's once more
    assert output.count(lm.read_text()) == 2 and chatlm.read_text() in output
    assert "you> Hi!\nbot> " in output
    assert "    you> Hi!\n    bot> " in (chatlm.parent / "model/README.md").read_text()
    after = real.states()
    assert before.items() <= after.items()  # own files are as they were
    assert {path.relative_to(real.folder).parts[0] for path in after.keys() - before} == {"out"}

    output = real.make("tokenizer", "lm", "chatlm", BARD)
    changed = [path for path, time in real.states().items() if after.get(path) != time]
    assert [path.name for path in changed] == []
    assert lm.read_text() in output and "you> Hi!\nbot> " in output

    vocabulary = (real.folder / "out/bard-tokenizer/tokenizer.json").read_bytes()
    real.write("mine/a.txt", "Something is rotten.\n\n" * 9)
    output = real.make("lm", BARD, status=2)
    assert "kept, although mine/a.txt has changed: it is the vocabulary of out/bard" in output
    assert "the data is no longer what this run began with" in output
    assert "remove out/bard to train anew" in output
    assert (real.folder / "out/bard-tokenizer/tokenizer.json").read_bytes() == vocabulary


@pytest.mark.parametrize(
    "change, message",
    [
        (('valid = ["held/valid.txt"]', ""), "[data] valid: found no files named; wanted some"),
        (("held/test.txt", "held/typo.txt"), "held/typo.txt: no such file, named by [data] "),
        (("n_layer = 1", "n_layers = 1"), "[model] n_layers: unknown key"),
    ],
)
def test_a_mistake_in_a_config_stops_before_training(
    real: Project, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], message: str
) -> None:
    monkeypatch.chdir(real.folder)
    real.write("configs/bard/lm.toml", LM.replace(*change))
    output = run("train", "--config", "configs/bard/lm.toml", status=2)
    assert message in output and "error: " in output
    assert not (real.folder / "out/bard").exists()


def test_without_test_files_a_run_ends_well(real: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(real.folder)
    real.write("configs/bard/lm.toml", LM.replace('test = ["held/test.txt"]', ""))
    run("train", "--config", "configs/bard/lm.toml")
    output = run("evaluate", "--config", "configs/bard/lm.toml")
    assert "configs/bard/lm.toml: names no test files, so there are no figures" in output

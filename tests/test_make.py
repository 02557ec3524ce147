"""`make` in a person's own folder: it does what the configs say, once, and spares own files."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run as run_command

from gptchat import paths
from gptchat.clean import clean, main
from gptchat.config import load_config
from gptchat.console import UserError
from gptchat.data.dialogue_files import read_prompts
from gptchat.files import lock_folder

ROOT = Path(__file__).resolve().parent.parent
# Commands that make runs are noted. Those that take long are replaced by what they leave behind.
PYTHON = """#!/bin/sh
[ "$1 $2" = "-m gptchat" ] && [ "$3" != paths ] && echo "$*" >> commands.log
case "$3" in
{stubs}
esac
exec env PYTHONPATH={root} {python} "$@"
"""
STUBS = """
train) run=$(sed -n 's/^run = "\\(.*\\)"/\\1/p' "$5"); mkdir -p "$run"; touch "$run/model"; exit 0;;
shards) exit 0;;
evaluate) echo "figures of $5"; exit 0;;
serve) exit 0;;
chat) while [ $# -gt 3 ] && [ "$1" != --input ]; do shift; done
  [ "$1" != --input ] || sed 's/$/\\tHello/' "$2" > "$4"; exit 0;;
corpora) mkdir -p data/lm data/chatlm
  for name in {corpora}; do echo text > $name; done; exit 0;;
"""
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
files = ["mine/*.txt"]
[data]
train = ["mine/*.txt"]
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


class Project:
    """A folder with a set-up of its own, in which `make` runs."""

    def __init__(self, folder: Path, stubs: str = STUBS):
        self.folder = folder
        self.log = folder / "commands.log"
        self.write("pyproject.toml", "")
        self.write("configs/constraints.txt", "")
        self.write("configs/prompts.tsv", "Hi!\n")
        stubs = stubs.replace("{corpora}", " ".join(paths.CORPORA))
        self.write("venv/bin/python", PYTHON.format(root=ROOT, python=sys.executable, stubs=stubs))
        (folder / "venv/bin/python").chmod(0o755)
        self.write("venv/.base", "")

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

    def age(self, name: str) -> None:
        """Let a file be a minute older than all others."""
        past = time.time() - 60
        os.utime(self.folder / name, (past, past))

    def exists(self, name: str) -> bool:
        return (self.folder / name).exists()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project with own text and dialogues, in configs/bard."""
    project = Project(tmp_path)
    write_own_files(project)
    return project


def write_own_files(project: Project) -> None:
    for name in ("mine/a.txt", "mine/b.txt", "held/valid.txt", "held/test.txt"):
        text = "To be, or not to be, that is the question.\n\nWho is there? Nay, answer me.\n\n" * 9
        project.write(name, text + name)
    for name in ("talks/a.tsv", "held/valid.tsv", "held/test.tsv"):
        project.write(name, f"Who is there?\tNay, answer me: {name}.\n" * 9)
    project.write("configs/bard/lm.toml", LM)
    project.write("configs/bard/chatlm.toml", CHATLM)


BARD = "CONFIGS=configs/bard"
TRAINING = [
    "tokenizer configs/bard/lm.toml",
    "shards configs/bard/lm.toml",
    "train configs/bard/lm.toml",
    "evaluate configs/bard/lm.toml",
]


def test_make_follows_the_configs_folders_and_files(project: Project) -> None:
    project.make("tokenizer", "lm", "chatlm", BARD)
    assert project.commands[:4] == TRAINING
    assert project.commands[4:6] == [
        "shards configs/bard/chatlm.toml",
        "train configs/bard/chatlm.toml",
    ]
    assert project.exists("out/bard/test.txt") and project.exists("out/bard-chat/test.txt")
    assert project.exists("out/bard-tokenizer/tokenizer.json")
    assert not project.exists("out/lm") and not project.exists("data")


def test_lm_and_chatlm_can_be_named_one_by_one(project: Project) -> None:
    project.make("lm", "LM=configs/bard/lm.toml")
    assert project.commands == TRAINING
    project.make("chatlm", "LM=configs/bard/lm.toml", "CHATLM=configs/bard/chatlm.toml")
    assert project.commands[:1] == ["shards configs/bard/chatlm.toml"]


def test_a_second_make_does_nothing(project: Project) -> None:
    project.make("tokenizer", "lm", "chatlm", BARD)
    output = project.make("tokenizer", "lm", "chatlm", BARD)
    assert project.commands == [] and output.count("Nothing to be done") == 3


def test_own_files_that_grew_are_noticed(project: Project) -> None:
    project.make("lm", BARD)
    project.write("mine/a.txt", "Something is rotten.\n\n" * 9)
    project.make("lm", BARD)
    assert project.commands == TRAINING
    project.write("mine/new.txt", "Alas, poor Yorick!\n")
    project.make("lm", BARD)
    assert project.commands == TRAINING


def test_a_vocabulary_stays_once_a_run_has_begun_with_it(project: Project) -> None:
    project.make("lm", BARD)
    project.write("out/bard/checkpoint.safetensors", "")
    before = (project.folder / "out/bard-tokenizer/tokenizer.json").read_bytes()
    project.write("mine/a.txt", "Something is rotten.\n\n" * 9)
    output = project.make("lm", BARD)
    assert project.commands == TRAINING[1:]
    assert "kept, although mine/a.txt has changed: out/bard was trained with it" in output
    assert (project.folder / "out/bard-tokenizer/tokenizer.json").read_bytes() == before


def test_a_vocabulary_from_elsewhere_is_never_trained_over(project: Project) -> None:
    project.make("tokenizer", BARD)
    (project.folder / "out/bard-tokenizer/trained.json").unlink()  # so it was not trained here
    project.write("mine/a.txt", "Something is rotten.\n\n" * 9)
    for _ in range(2):
        output = project.make("tokenizer", BARD)
        assert project.commands == []
        assert "out/bard-tokenizer: kept as it is; it was not trained here\n" in output


def test_gpt2s_pair_of_files_is_a_vocabulary_from_elsewhere(project: Project) -> None:
    project.write("out/bard-tokenizer/merges.txt", "#version: 0.2\n")
    project.write("out/bard-tokenizer/vocab.json", "{}")
    project.make("lm", BARD)
    assert project.commands == TRAINING[1:]


def test_a_vocabulary_that_another_config_trained_stays(project: Project) -> None:
    project.make("tokenizer", BARD)
    project.write("configs/other/lm.toml", LM.replace("vocab_size = 300", "vocab_size = 310"))
    output = project.make("tokenizer", "CONFIGS=configs/other")
    assert project.commands == []
    assert "kept as it is; configs/bard/lm.toml trained it, and vocab_size was 300" in output
    project.write("configs/other/lm.toml", LM)
    assert "kept" not in project.make("tokenizer", "CONFIGS=configs/other")


def test_a_changed_size_trains_the_vocabulary_anew(project: Project) -> None:
    project.make("tokenizer", BARD)
    project.write("configs/bard/lm.toml", LM.replace("vocab_size = 300", "vocab_size = 310"))
    project.make("tokenizer", BARD)
    assert project.commands == TRAINING[:1]


def test_default_corpora_are_made_only_when_a_config_names_them(project: Project) -> None:
    project.make("lm", BARD)
    assert not project.exists("data")
    own = LM.replace('["held/test.txt"]', '["data/lm/*test.txt"]')
    project.write("configs/bard/lm.toml", own)
    project.make("lm", BARD)
    assert project.commands[0] == "corpora" and project.exists("data/lm/test.txt")
    project.make("lm", BARD)
    assert project.commands == []


def test_the_default_configs_make_the_default_corpora_first(project: Project) -> None:
    for name in ("lm", "chatlm"):
        shutil.copy(ROOT / "configs" / f"{name}.toml", project.folder / "configs")
    project.make("tokenizer", "lm", "chatlm")
    commands = [command.split()[0] for command in project.commands]
    assert commands[:5] == ["corpora", "tokenizer", "shards", "train", "evaluate"]
    assert project.exists("out/lm/test.txt") and project.exists("out/chatlm/test.txt")
    project.make("tokenizer", "lm", "chatlm")
    assert project.commands == []


def test_the_names_of_the_default_corpora_are_those_that_are_written(small: Path) -> None:
    written = [path for path in (small / "whole").rglob("*") if path.is_file()]
    names = {f"data/{path.relative_to(small / 'whole')}" for path in written}
    assert names == set(paths.CORPORA)


@pytest.mark.parametrize(
    "change, message",
    [
        (('valid = ["held/valid.txt"]', ""), "[data] valid: found no files named; wanted some"),
        (("held/test.txt", "held/typo.txt"), "held/typo.txt: no such file, named by [data] of "),
        (("out/bard", "my bard"), "run: found 'my bard'; wanted a folder for make"),
        (("out/bard", "held"), "run: found 'held', where make would write held/test.txt"),
        (("n_layer = 1", "n_layers = 1"), "[model] n_layers: unknown key"),
    ],
)
def test_a_mistake_in_a_config_stops_before_any_work(
    project: Project, change: tuple[str, str], message: str
) -> None:
    project.write("configs/bard/lm.toml", LM.replace(*change))
    output = project.make("tokenizer", "lm", "chatlm", BARD, status=2)
    assert message in output and "error: " in output and "nothing was done" in output
    assert project.commands == [] and not project.exists("out")


def test_a_missing_config_is_one_error_and_no_work(project: Project) -> None:
    output = project.make("lm", "CONFIGS=configs/typo", status=2)
    assert "error: configs/typo/lm.toml: cannot be read: No such file" in output


@pytest.mark.parametrize(
    "arguments",
    [
        ("lm", BARD, "LM=configs/typo.toml"),
        ("chat", BARD, "LM=configs/typo.toml"),
        ("lm", "chatlm", BARD, "CHATLM=configs/typo.toml"),
        ("clean", BARD, "CHATLM=configs/typo.toml"),
    ],
)
def test_a_misspelt_config_is_an_error_although_the_other_one_is_there(
    project: Project, arguments: tuple[str, ...]
) -> None:
    output = project.make(*arguments, status=2)
    assert "error: configs/typo.toml: cannot be read: No such file" in output
    assert project.commands == [] or arguments[0] == "clean"


def test_a_target_whose_config_is_missing_is_an_error(project: Project) -> None:
    for target, name in (("chatlm", "chatlm.toml"), ("lm", "lm.toml")):
        moved = (project.folder / "configs/bard" / name).rename(project.folder / name)
        output = project.make(target, BARD, status=2)
        assert f"error: configs/bard/{name}: cannot be read: No such file" in output
        assert project.commands == []
        moved.rename(project.folder / "configs/bard" / name)


def test_clean_names_a_folder_of_configs_that_is_not_there(project: Project) -> None:
    output = project.make("clean", "CONFIGS=configs/mien", status=2)
    assert "error: configs/mien/lm.toml: cannot be read: No such file" in output


def test_a_file_whose_name_make_cannot_handle_is_told_and_used_all_the_same(
    project: Project,
) -> None:
    (project.folder / "mine/b.txt").rename(project.folder / "mine/two words.txt")
    output = project.make("lm", BARD)
    assert "'mine/two words.txt': make cannot handle a name with other characters" in output
    assert output.count("make cannot handle") == 1  # although [data] and [tokenizer] name it
    assert project.commands == TRAINING
    record = json.loads((project.folder / "out/bard-tokenizer/trained.json").read_text())
    assert list(record["sources"]) == ["mine/a.txt", "mine/two words.txt"]


def test_files_that_make_cannot_handle_are_told_in_one_line_for_both_configs(
    project: Project,
) -> None:
    (project.folder / "mine/b.txt").rename(project.folder / "mine/b (1).txt")
    (project.folder / "talks/a.tsv").rename(project.folder / "talks/[a].tsv")
    output = project.make("lm", "chatlm", BARD)
    assert output.count("make cannot handle") == 1
    assert "'mine/b (1).txt': make cannot" in output and "(2 files are named so)" in output


def test_a_chatlm_without_an_lm_trains_its_own_vocabulary(project: Project) -> None:
    (project.folder / "configs/bard/lm.toml").unlink()
    alone = LM.replace("out/bard", "out/chat").replace("mine/*.txt", "talks/*.tsv")
    alone = alone.replace("valid.txt", "valid.tsv").replace("test.txt", "test.tsv")
    project.write("configs/bard/chatlm.toml", 'task = "chatlm"\n' + alone)
    output = project.make("tokenizer", "lm", "chatlm", BARD)
    assert "configs/bard/lm.toml: no such file, so there is no LM to train" in output
    assert project.commands[:3] == [
        "tokenizer configs/bard/chatlm.toml",
        "shards configs/bard/chatlm.toml",
        "train configs/bard/chatlm.toml",
    ]


def test_chat_and_serve_take_what_these_configs_have_trained(project: Project) -> None:
    project.write("out/lm/model/model.safetensors", "of other configs")
    project.write("venv/.serve", "")
    chatlm, lm = "--model chatlm=out/bard-chat/model", "--model lm=out/bard/model"
    project.make("serve", BARD)
    assert project.commands == [f"serve --host 127.0.0.1 {chatlm} {lm}"]
    project.write("out/bard/model/model.safetensors", "")
    project.make("mar", BARD)
    assert project.commands == [f"serve --archive-only {lm}"]
    project.make("chat", BARD)
    assert project.commands == ["chat --model out/bard-chat/model"]
    (project.folder / "configs/bard/chatlm.toml").unlink()
    project.make("chat", BARD)
    assert project.commands == ["chat --model out/bard/model"]


def test_prompts_that_cannot_be_answered_stop_make_before_it_trains(project: Project) -> None:
    project.write("configs/bard/prompts.tsv", "Hi!\n\t \t\n")
    output = project.make("chatlm", BARD, status=2)
    assert "error: configs/bard/prompts.tsv:2: found" in output
    assert project.commands == []
    assert project.make("tokenizer", "lm", BARD) and project.commands


@pytest.mark.parametrize("own", [True, False])
def test_a_new_chatlm_answers_the_prompts_beside_its_config_or_else_the_default_ones(
    project: Project, own: bool
) -> None:
    if own:
        project.write("configs/bard/prompts.tsv", "Who?\tMe.\tWho is there?\n")
    output = project.make("chatlm", BARD)
    (chat,) = [command for command in project.commands if command.startswith("chat ")]
    assert f" --input configs/{'bard/' if own else ''}prompts.tsv " in chat
    assert f"\nyou> {'Who is there?' if own else 'Hi!'}\nbot> Hello\n" in output


@pytest.mark.parametrize(
    "targets, pick", [("turns", "mmi"), ("all", "mmi"), ("responder", "median"), ("", "median")]
)
def test_one_of_five_answers_is_picked_as_the_model_can_score_them(
    project: Project, targets: str, pick: str
) -> None:
    key = f'[data]\ntargets = "{targets}"' if targets else "[data]"
    project.write("configs/bard/chatlm.toml", CHATLM.replace("[data]", key))
    project.make("chatlm", BARD)
    (chat,) = [command for command in project.commands if command.startswith("chat ")]
    assert f" --pick {pick} " in chat


def test_the_prompts_of_our_config_are_one_turn_each() -> None:
    prompts = list(read_prompts(ROOT / "configs/prompts.tsv"))
    assert [len(prompt.turns) for prompt in prompts] == [1] * 10


def test_without_test_files_a_run_ends_well(project: Project) -> None:
    project.write("configs/bard/lm.toml", LM.replace('test = ["held/test.txt"]', ""))
    project.make("lm", BARD)
    assert project.commands == TRAINING[:3]
    assert (project.folder / "out/bard/test.txt").read_text() == "no test data\n"


def test_the_set_up_comes_first_where_there_is_none(project: Project) -> None:
    python = project.folder / "venv/bin/python"
    content = python.read_text()
    shutil.rmtree(project.folder / "venv")
    project.write("python", MAKE_VENV.replace("{python}", content))
    (project.folder / "python").chmod(0o755)
    output = project.make("tokenizer", "lm", "PYTHON=./python", BARD)
    assert project.commands == TRAINING
    assert output.index("venv/bin/pip") < output.index("gptchat tokenizer")


def test_clean_removes_what_was_made_and_nothing_else(project: Project) -> None:
    project.make("tokenizer", BARD)
    project.write("out/bard/config.json", '{"task": 0, "run": 0, "train": 0, "text": 0}')
    for name in ("log.jsonl", "checkpoint.safetensors", "model/model.safetensors", "notes.txt"):
        project.write(f"out/bard/{name}", "")
    project.write("out/bard-shards/lm/meta.json", '{"format": 2, "splits": {}}')
    project.write("out/bard-shards/lm/train-00000.bin", "")
    project.write("out/my-plan.txt", "")
    project.write("out/elsewhere/config.json", "{}")
    output = project.make("clean", BARD)
    left = {str(path.relative_to(project.folder)) for path in project.folder.glob("out/**/*")}
    assert left == {
        "out/bard",
        "out/bard/notes.txt",
        "out/my-plan.txt",
        "out/elsewhere",
        "out/elsewhere/config.json",
    }
    assert "out/bard: kept notes.txt (not made from these configs" in output
    assert project.exists("mine/a.txt")


def test_clean_spares_vocabularies_of_others_and_folders_that_are_no_run(project: Project) -> None:
    project.make("tokenizer", BARD)
    (project.folder / "out/bard-tokenizer/trained.json").unlink()
    project.write("out/bard/config.json", '{"my": "own"}')
    project.write("out/bard/test.txt", "mine")
    project.make("clean", BARD)
    for name in ("out/bard-tokenizer/tokenizer.json", "out/bard/config.json", "out/bard/test.txt"):
        assert project.exists(name)


@pytest.mark.slow
def test_clean_data_removes_the_default_corpora_that_nobody_changed(
    project: Project, small: Path
) -> None:
    shutil.copytree(small / "whole", project.folder / "data")
    project.write("data/lm/mine.txt", "own text")
    project.write("data/chatlm/train.tsv", "own\tdialogues\n")
    output = project.make("clean-data")
    left = {str(path.relative_to(project.folder)) for path in project.folder.glob("data/**/*.t*")}
    assert left == {"data/lm/mine.txt", "data/chatlm/train.tsv"}
    assert "data/chatlm/train.tsv: kept" in output


@pytest.mark.slow
def test_clean_removes_all_that_a_run_and_its_shards_in_parts_leave(
    small: Path, tmp_path: Path
) -> None:
    config, folder = small / "lm.toml", tmp_path / "out"
    overrides = [f"run={folder}/run", "train.num_steps=2", "train.eval_interval=1"]
    run_command("train", "--config", config, *overrides)
    for part in ("1/2", "2/2"):
        shards = f"data.shards={folder}/shards"
        run_command("shards", "--config", config, "--part", part, shards)
    own = [f"run={folder}/run", f"data.shards={folder}/shards"]  # the vocabulary is another's
    clean({"another.toml": load_config(str(config), own)}, tmp_path / "serve")
    assert not folder.exists()


RUN = '{"task": 0, "run": 0, "train": 0, "text": 0}'
META = '{"format": 2, "splits": {}}'
MANIFEST = '{"model": {"handler": "gptchat_handler.py"}}'


def test_clean_spares_data_in_the_runs_folder_and_says_so_once(project: Project) -> None:
    config = LM.replace("out/bard-shards/lm", "out/bard/shards").replace(
        "held/test", "out/bard/test"
    )
    project.write("configs/bard/lm.toml", config)
    for name in ("config.json", "test.txt", "log.jsonl", "shards/train-00000.bin"):
        project.write(f"out/bard/{name}", RUN)
    project.write("out/bard/shards/meta.json", META)
    output = project.make("clean", BARD)
    left = [path for path in (project.folder / "out/bard").rglob("*")]
    assert left == [project.folder / "out/bard/test.txt"]
    assert [line for line in output.splitlines() if line.startswith("out/bard: ")] == [
        "out/bard: kept test.txt (not made from these configs, or named as their data)"
    ]
    assert "out/bard/shards: removed" in output


def test_clean_of_shards_in_parts_takes_each_parts_lock(project: Project) -> None:
    shards = project.folder / "out/bard-shards/lm"
    for part in ("part-00001-of-00002", "part-00002-of-00002", "part-of-mine-of-00002"):
        project.write(f"out/bard-shards/lm/{part}/train-00000.bin", "")
        project.write(f"out/bard-shards/lm/{part}/meta.json", META)
    with lock_folder(shards / "part-00002-of-00002", "busy"):
        output = project.make("clean", BARD, status=2)
        assert "part-00002-of-00002: another process works here" in output
        assert (shards / "part-00002-of-00002/train-00000.bin").exists()
    project.make("clean", BARD)
    assert [path.name for path in shards.iterdir()] == ["part-of-mine-of-00002"]
    assert (shards / "part-of-mine-of-00002/train-00000.bin").exists()


def test_clean_removes_archives_that_the_launcher_made_and_follows_no_link(
    project: Project,
) -> None:
    store, elsewhere = project.folder / "out/serve/store", project.folder / "elsewhere"
    for name in ("store/mine.mar", "logs/mine.log", "tmp/mine", "staging/mine", "draining"):
        project.write(f"out/serve/{name}", "")
    for name in ("MAR-INF/MANIFEST.json", "gptchat/clean.py", "model/model.safetensors"):
        project.write(f"out/serve/store/large/{name}", MANIFEST)
        project.write(f"elsewhere/{name}", MANIFEST)
    with zipfile.ZipFile(store / "lm.mar", "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", MANIFEST)
    (store / "linked").symlink_to(elsewhere)
    (store / "large/handlers").symlink_to(elsewhere)
    with lock_folder(project.folder / "out/serve", "busy"):
        assert "out/serve: another process works" in project.make("clean", BARD, status=2)
        assert (store / "lm.mar").exists()
    output = project.make("clean", BARD)
    kept = ["logs/mine.log", "staging/mine", "store/large/handlers", "store/linked"]
    kept += ["store/mine.mar", "tmp/mine"]
    serve = project.folder / "out/serve"
    left = [path for path in serve.rglob("*") if path.is_symlink() or path.is_file()]
    assert sorted(str(path.relative_to(serve)) for path in left) == kept
    assert len(list(elsewhere.rglob("*.*"))) == 3
    assert f"out/serve: kept {', '.join(kept[:3])} ..." in output


def test_clean_tells_in_a_line_of_what_cannot_be_removed(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    project.write("out/bard/config.json", RUN)
    monkeypatch.chdir(project.folder)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match="^out/bard/config.json: cannot be removed: Permission "):
        main(["--config", "configs/bard/lm.toml"])


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Project]:
    """A project in which every command is the real one."""
    project = Project(tmp_path, stubs="")
    write_own_files(project)
    yield project


@pytest.mark.slow
def test_two_real_runs_from_own_files_and_what_happens_when_they_change(real: Project) -> None:
    text = (real.folder / "mine/b.txt").read_bytes()
    (real.folder / "mine/b.txt").unlink()
    (real.folder / "mine/b.txt.gz").write_bytes(gzip.compress(text))
    lm = LM.replace('"mine/*.txt"', '"mine/*.txt", "mine/*.gz"')
    real.write("configs/bard/lm.toml", lm)
    real.make("tokenizer", "lm", "chatlm", BARD)
    assert "held/test.txt: loss" in (real.folder / "out/bard/test.txt").read_text()
    assert "held/test.tsv: loss" in (real.folder / "out/bard-chat/test.txt").read_text()
    assert not real.exists("data") and not real.exists("out/lm")
    real.write("mine/a.txt", "Something is rotten.\n\n" * 9)
    output = real.make("lm", BARD, status=2)
    assert "the data is no longer what this run began with" in output
    assert "remove out/bard to train anew" in output and "touch out/bard/test.txt" in output
    assert real.exists("out/bard/test.txt")

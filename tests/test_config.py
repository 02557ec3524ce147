"""Config files: read whole, checked by name and type, overridden, and told in one line when wrong."""

import os
from pathlib import Path

import pytest

from gptchat.config import load_config
from gptchat.console import UserError
from gptchat.files import atomic_write, expand

ROOT = Path(__file__).parent.parent
GOOD = "[model]\nn_layer = 1\nn_head = 1\nn_embd = 8\nn_ctx = 8\n[train]\nnum_steps = 1\n"


def write(folder: Path, text: str) -> str:
    (folder / "a.toml").write_text(text)
    return str(folder / "a.toml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*lm.toml")), ids=str)
def test_every_config_of_the_project_loads(path: Path) -> None:
    assert load_config(str(path)).task == path.stem


def test_an_override_is_a_toml_value_or_else_a_string(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, GOOD),
        [
            "train.learning_rate=1e-2",
            "run=out/x y",
            "data.train=a.txt",
            'data.test=["b", "c"]',
            "train.weight_decay=1",
            "train.compile=true",
        ],
    )
    assert (config.train.learning_rate, config.run, config.train.weight_decay) == (
        0.01,
        "out/x y",
        1.0,
    )
    assert (config.data.train, config.data.test, config.train.compile) == (
        ("a.txt",),
        ("b", "c"),
        True,
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GOOD + "batch_sise = 3\n", "[train] batch_sise: unknown key; wanted one of seed"),
        (GOOD + "batch_size = 2.5\n", "[train] batch_size: found 2.5; wanted a value of type int"),
        (GOOD + "compile = 1\n", "[train] compile: found 1; wanted a value of type bool"),
        (GOOD + "warmup_ratio = 1.5\n", "[train] warmup_ratio: found 1.5; wanted a value below 1"),
        (GOOD + 'schedule = "cosin"\n', "[train] schedule: found 'cosin'; wanted one of"),
        (
            "train = 3\n" + GOOD.replace("[train]\nnum_steps = 1\n", ""),
            "found 3; wanted a section [train]",
        ),
        (
            "[data]\ntrain = [1]\n" + GOOD,
            "[data] train: found [1]; wanted a string or a list of strings",
        ),
        (
            GOOD.replace("n_embd = 8", "n_embd = 9").replace("n_head = 1", "n_head = 2"),
            "no multiple",
        ),
        ("[model]\nn_ctx = 8\n[train]\nnum_steps = 1\n", "init_from"),
        (GOOD.replace("n_head = 1", "n_head = 0"), "wants n_layer, n_head"),
        (GOOD + "learning_rate = inf\n", "[train] learning_rate: found inf"),
        (GOOD.replace("num_steps = 1", ""), "exactly one of num_epochs and num_steps"),
        ("task = \n", "not valid TOML"),
        ("\ufeff\x00", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, text))
    assert told in str(error.value) and str(tmp_path / "a.toml") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.learning_rate", "found no '='"),
        ("=3", "found no '='"),
        ("run.x=3", "run is a value, not a section"),
        ("model.depth=3", "unknown key"),
    ],
)
def test_wrong_overrides_are_named(tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(UserError, match="^[^\n]+$") as error:
        load_config(write(tmp_path, 'run = "a"\n' + GOOD), [override])
    assert told in str(error.value)


def test_globs_name_files_in_order_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.tsv"):
        (tmp_path / name).touch()
    assert [
        path.name for path in expand([f"{tmp_path}/*.txt", f"{tmp_path}/c.tsv"], "data.train")
    ] == ["a.txt", "b.txt", "c.tsv"]
    with pytest.raises(UserError, match="no such file, named by data.train"):
        expand([f"{tmp_path}/*.md"], "data.train")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(KeyError), atomic_write(path) as temporary:
        temporary.write_text("two")
        raise KeyError
    assert path.read_text() == "one"
    assert os.listdir(path.parent) == ["file"]

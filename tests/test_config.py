"""Config files: read whole, checked by name and type, overridden, and refused in one line."""

import dataclasses
import json
import re
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest

from gptchat import paths
from gptchat.config import Config, TrainConfig, load_config
from gptchat.console import UserError
from gptchat.settings import RENAMED, build, setting
from gptchat.training.metrics import PRECISIONS
from gptchat.training.optim import SCHEDULES
from gptchat.training.saved_config import FREE_KEYS

ROOT = Path(__file__).parent.parent
GOOD = "[model]\nn_layer = 1\nn_head = 1\nn_embd = 8\nn_ctx = 8\n[train]\nnum_steps = 1\n"


def write(folder: Path, text: str) -> str:
    (folder / "a.toml").write_text(text)
    return str(folder / "a.toml")


# --- what loads


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*lm.toml")), ids=str)
def test_every_config_of_the_project_loads(path: Path) -> None:
    assert load_config(str(path)).task == path.stem


def test_an_override_is_a_toml_value_or_else_a_string(tmp_path: Path) -> None:
    overrides = [
        "train.learning_rate=1e-2",
        "run=out/x y",
        "data.train=a.txt",
        'data.test=["b", "c"]',
        "train.weight_decay=1",
        "train.compile=true",
    ]
    config = load_config(write(tmp_path, GOOD), overrides)
    assert config.train.learning_rate == 0.01
    assert config.run == "out/x y"
    assert config.data.train == ("a.txt",)
    assert config.data.test == ("b", "c")
    assert (config.train.weight_decay, type(config.train.weight_decay)) == (1.0, float)
    assert config.train.compile is True


# --- what is refused


@pytest.mark.parametrize(
    ("text", "message"),
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
        (
            '[data]\ntrain = ["a", "b"]\nweights = [1]\n' + GOOD,
            "[data] weights: found 1; wanted 2, one for each entry of train",
        ),
        ("task = \n", "not valid TOML"),
        ("\ufeff\x00", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, text))
    assert message in str(error.value)
    assert str(tmp_path / "a.toml") in str(error.value)
    assert "\n" not in str(error.value)


def test_make_is_told_of_two_configs_with_one_run_folder(tmp_path: Path) -> None:
    lm, chatlm = tmp_path / "lm.toml", tmp_path / "chatlm.toml"
    lm.write_text('run = "out/x"\n' + GOOD)
    chatlm.write_text('task = "chatlm"\nrun = "out/./x/"\n' + GOOD)
    both = ["--lm", str(lm), "--chatlm", str(chatlm)]
    with pytest.raises(UserError, match=f"{lm} and {chatlm}: both have the run folder out/x;"):
        paths.main(both)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate", "found no '='"),
        ("=3", "found no '='"),
        ("run.x=3", "run is a value, not a section"),
        ("model.depth=3", "unknown key"),
    ],
)
def test_wrong_overrides_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match="^[^\n]+$") as error:
        load_config(write(tmp_path, 'run = "a"\n' + GOOD), [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("accumulation", "gradient_accumulation_steps"),
        ("warmup_rate", "warmup_ratio"),
        ("final_rate", "min_lr_ratio"),
    ],
)
def test_a_renamed_key_is_refused_with_its_new_name(tmp_path: Path, old: str, new: str) -> None:
    in_file = write(tmp_path, GOOD + f"{old} = 0.5\n")
    with pytest.raises(UserError, match=f"^[^\n]+ {old}: renamed; .* {new}$"):
        load_config(in_file)
    without = write(tmp_path, GOOD)
    with pytest.raises(UserError, match=f"^[^\n]+ {old}: renamed; .* {new}$"):
        load_config(without, [f"train.{old}=0.5"])


def test_a_renamed_key_is_merely_unknown_to_a_section_that_never_had_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown key; wanted one of n_layer"):
        load_config(write(tmp_path, GOOD), ["model.warmup_rate=0.5"])


@dataclass(frozen=True)
class Limits:
    """Settings as another module declares them."""

    queue: int = setting(4, "waiting requests", min=1, max=8)


def test_build_checks_any_dataclass_of_settings() -> None:
    assert build(Limits, {}, "limits.yaml") == Limits(4)
    assert build(Limits, {"queue": 8}, "limits.yaml") == Limits(8)
    with pytest.raises(UserError, match="^limits.yaml: queue: found 9; wanted at most 8$"):
        build(Limits, {"queue": 9}, "limits.yaml")
    with pytest.raises(UserError, match=r"^limits.yaml: \[serve\] queue: found 0; wanted at least"):
        build(Limits, {"queue": 0}, "limits.yaml", "serve")
    with pytest.raises(UserError, match="^limits.yaml: size: unknown key; wanted one of queue$"):
        build(Limits, {"size": 9}, "limits.yaml")


# --- one list of everything


def test_the_choices_of_a_config_are_those_that_training_knows() -> None:
    choices = {
        field.name: set(field.metadata["choices"])
        for field in dataclasses.fields(TrainConfig)
        if "choices" in field.metadata
    }
    assert choices["schedule"] == SCHEDULES.keys()
    assert choices["precision"] == PRECISIONS.keys() | {"auto"}


TYPE_NAMES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    tuple[str, ...]: "list of strings",
    tuple[float, ...]: "list of numbers",
}
LIMITS = {"min": "at least", "max": "at most", "above": "above", "below": "below"}


def readme_section(title: str) -> str:
    """What stands in configs/README.md below the heading `## title`."""
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table_row(field: dataclasses.Field, hint: type) -> str:
    """A setting's row in configs/README.md: key, type, default, allowed values, meaning."""
    default = json.dumps(field.default)
    if "choices" in field.metadata:
        allowed = ", ".join(f"`{json.dumps(choice)}`" for choice in field.metadata["choices"])
    else:
        limits = [
            f"{name} {field.metadata[rule]}"
            for rule, name in LIMITS.items()
            if rule in field.metadata
        ]
        allowed = ", ".join(limits) or "any"
    type_name = TYPE_NAMES[hint]
    return f"| `{field.name}` | {type_name} | `{default}` | {allowed} | {field.metadata['help']} |"


def expected_tables() -> dict[str, list[str]]:
    """The rows of each section's table; "" stands for the keys above all sections."""
    tables: dict[str, list[str]] = {"": []}
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        section = hints[field.name]
        if not dataclasses.is_dataclass(section):
            tables[""].append(table_row(field, section))
            continue
        keys = typing.get_type_hints(section)
        tables[field.name] = [table_row(key, keys[key.name]) for key in dataclasses.fields(section)]
    return tables


def test_the_readme_lists_every_key_with_its_type_default_limits_and_meaning() -> None:
    """A failure shows the rows that are missing, as they must stand in the file."""
    tables: dict[str, list[str]] = {}
    for part in readme_section("Every key").split("\n### ")[1:]:
        title, *lines = part.splitlines()
        section = title.strip("`[]") if title.startswith("`[") else ""
        tables[section] = [line for line in lines if line.startswith("| `")]
    expected = expected_tables()
    rows_in_file = {row for rows in tables.values() for row in rows}
    missing = [row for rows in expected.values() for row in rows if row not in rows_in_file]
    assert missing == []
    assert tables == expected


def test_the_readme_lists_every_renamed_key() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|$", readme_section("Renamed keys"), re.MULTILINE)
    assert dict(rows) == RENAMED


def test_the_readme_lists_the_keys_that_a_resumed_run_may_change() -> None:
    keys = re.findall(
        r"^- `([\w.]+)`", readme_section("Changing the config of a run"), re.MULTILINE
    )
    assert set(keys) == FREE_KEYS

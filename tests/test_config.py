"""Config files: read whole, checked by name and type, overridden, and refused in one line."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from gptchat import config
from gptchat.config import Config, load_config
from gptchat.console import UserError
from gptchat.settings import build, check_all, declared, setting, table, update_tables
from gptchat.training.metrics import PRECISIONS
from gptchat.training.optim import SCHEDULES

ROOT = Path(__file__).parent.parent
GOOD = "[model]\nn_layer = 1\nn_head = 1\nn_embd = 8\nn_ctx = 8\n[train]\nnum_steps = 1\n"


def write(folder: Path, text: str) -> str:
    (folder / "a.toml").write_text(text)
    return str(folder / "a.toml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*lm.toml")), ids=str)
def test_every_config_of_the_project_loads(path: Path) -> None:
    assert load_config(str(path)).task == path.stem


def test_an_override_is_a_toml_value_or_else_a_string(tmp_path: Path) -> None:
    overrides = ["train.learning_rate=1e-2", "run=out/x y", "data.train=a.txt"]
    overrides += ['data.test=["b", "c"]', "train.weight_decay=1", "train.compile=true"]
    config = load_config(write(tmp_path, GOOD), overrides)
    assert config.train.learning_rate == 0.01
    assert config.run == "out/x y"
    assert config.data.train == ("a.txt",)
    assert config.data.test == ("b", "c")
    assert (config.train.weight_decay, type(config.train.weight_decay)) == (1.0, float)
    assert config.train.compile is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "batch_sise = 3\n", "[train] batch_sise: unknown key; wanted one of seed"),
        (GOOD + "batch_size = 2.5\n", "[train] batch_size: found 2.5; wanted an integer, at least"),
        ("train = 3\n" + GOOD.split("[train]")[0], "train: found 3; wanted a section [train]"),
        (
            GOOD.replace("n_embd = 8", "n_embd = 9").replace("n_head = 1", "n_head = 2"),
            "no multiple",
        ),
        ("[model]\nn_ctx = 8\n[train]\nnum_steps = 1\n", "init_from"),
        (f'run = "out/shards/lm"\n{GOOD}', "wanted three folders"),
        (f'run = "out/./tokenizer/"\n{GOOD}', "wanted three folders"),
        (GOOD.replace("num_steps = 1", ""), "exactly one of num_epochs and num_steps"),
        (
            '[data]\ntrain = ["a", "b"]\nweights = [1]\n' + GOOD,
            "[data] weights: found 1; wanted 2, one for each entry of train",
        ),
        ("task = \n", "not valid TOML"),
        ("\x00", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match="^[^\n]+$") as error:
        load_config(write(tmp_path, text))
    assert message in str(error.value)
    assert str(tmp_path / "a.toml") in str(error.value)


def test_a_config_of_a_windows_editor_is_read(tmp_path: Path) -> None:
    write(tmp_path, "\ufeff" + GOOD.replace("\n", "\r\n"))
    assert load_config(str(tmp_path / "a.toml")) == load_config(write(tmp_path, GOOD))


@pytest.mark.parametrize("bytes", [GOOD.encode("utf-16"), "# \xe9\n".encode("latin-1")])
def test_a_config_in_another_encoding_is_refused(tmp_path: Path, bytes: bytes) -> None:
    (tmp_path / "a.toml").write_bytes(bytes)
    with pytest.raises(
        UserError, match=r"a\.toml: not UTF-8 at byte \d; wanted a TOML file in it$"
    ):
        load_config(str(tmp_path / "a.toml"))


@pytest.mark.parametrize(
    "path", [r"C:\data\a.txt", r"C:\new\train.txt", r"C:\Users\a.txt", r"data\train.txt"]
)
def test_a_path_with_backslashes_says_how_to_write_it(tmp_path: Path, path: str) -> None:
    for value in (f'"{path}"', f'["{path}"]'):
        with pytest.raises(
            UserError, match="^[^\n]*a.toml: [^\n]*; wanted / in paths, or '' around them"
        ):
            load_config(write(tmp_path, f"[data]\ntrain = {value}\n" + GOOD))
    literal = load_config(write(tmp_path, f"[data]\ntrain = '{path}'\n" + GOOD))
    assert literal == load_config(write(tmp_path, GOOD), [f"data.train={path}"])
    assert literal.data.train == (path,)


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


# --- settings: any dataclass of them


@dataclass(frozen=True)
class Limits:
    queue: int = setting(4, "waiting requests", min=1, max=8)
    share: float = setting(0.5, "of the memory", above=0, below=1)
    names: tuple[str, ...] = setting((), "hosts")
    dtype: str = setting("auto", "of the weights", choices=("auto", "int8"))
    logprobs: int | None = setting(None, "listed", min=0)
    strict: bool = setting(False, "refuse more")
    seed: int = 0  # no setting

    def __post_init__(self) -> None:
        check_all(self)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("queue", 9, "an integer, 1 to 8"),
        ("queue", True, "an integer, 1 to 8"),
        ("queue", 2.0, "an integer, 1 to 8"),
        ("queue", None, "an integer, 1 to 8"),
        ("share", 1, "a number, above 0 and below 1"),
        ("share", float("nan"), "a number, above 0 and below 1"),
        ("names", ["a", 1], "a string or a list of strings"),
        ("dtype", "int4", "one of auto, int8"),
        ("logprobs", -1, "an integer, at least 0"),
        ("strict", 1, "true or false"),
    ],
)
def test_a_setting_refuses_other_types_and_values(name, value, wanted) -> None:
    with pytest.raises(UserError) as error:
        build(Limits, {name: value}, "limits.yaml", "serve")
    assert str(error.value) == f"limits.yaml: [serve] {name}: found {value!r}; wanted {wanted}"
    with pytest.raises(ValueError, match=f"^{name}: found "):
        Limits(**{name: value})


def test_a_table_becomes_an_instance_whose_values_have_their_types() -> None:
    values = {"names": "a", "share": 0.25, "logprobs": None, "queue": 8}
    assert build(Limits, values, "limits.yaml") == Limits(8, 0.25, ("a",))
    assert type(declared(TwoRates)["rates"].check([1, 2])[0]) is float
    assert "seed" not in declared(Limits)


@dataclass(frozen=True)
class TwoRates:
    rates: tuple[float, ...] = setting((0.5,), "of two groups", above=0)


def test_tables_are_written_between_their_markers(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- table: x -->\nold\n<!-- end -->\nb\n<!-- end -->\n")
    for _ in range(2):
        update_tables(path, {"x": table(TwoRates)})
    assert path.read_text() == (
        "a\n<!-- table: x -->\n| key | value | default | meaning |\n| --- | --- | --- | --- |\n"
        "| `rates` | a number or a list of numbers, above 0 | `[0.5]` | of two groups |\n"
        "<!-- end -->\nb\n<!-- end -->\n"
    )


# --- one list of everything


def test_the_readme_has_the_tables_that_python_m_gptchat_config_writes(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    current = (ROOT / "configs/README.md").read_text(encoding="utf-8")
    path.write_text(current, encoding="utf-8")
    update_tables(path, config.tables())
    assert path.read_text(encoding="utf-8") == current, "run `python -m gptchat.config`"


def test_the_choices_of_a_config_are_those_that_training_knows() -> None:
    choices = {name: one.rules.get("choices") for name, one in declared(config.TrainConfig).items()}
    assert set(choices["schedule"]) == SCHEDULES.keys()
    assert set(choices["precision"]) == PRECISIONS.keys() | {"auto"}
    assert Config().task in declared(Config)["task"].rules["choices"]

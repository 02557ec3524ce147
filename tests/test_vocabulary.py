"""Vocabularies: what they are trained on, and who may train them again."""

import json
import os
from pathlib import Path

import pytest

from gptchat.config import load_config
from gptchat.console import UserError
from gptchat.data import tokenizer, vocabulary

CONFIG = """
run = "{folder}/run"
[tokenizer]
dir = "{folder}/tokenizer"
vocab_size = {size}
files = ["{folder}/*.txt"]
[model]
n_layer = 1
n_head = 1
n_embd = 8
n_ctx = 8
[train]
num_steps = 1
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with text, a config and the vocabulary that it has trained."""
    (tmp_path / "a.txt").write_text("To be or not to be, that is the question. " * 20)
    (tmp_path / "own.toml").write_text(CONFIG.format(folder=tmp_path, size=280))
    tokenizer.main(["--config", str(tmp_path / "own.toml")])
    return tmp_path


def standing(folder: Path, name: str = "own.toml") -> vocabulary.Standing:
    path = str(folder / name)
    return vocabulary.standing(load_config(path), path)


def test_a_vocabulary_is_trained_once(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert standing(own) == (True, False, "")
    capsys.readouterr()
    tokenizer.main(["--config", str(own / "own.toml")])
    assert capsys.readouterr().out.startswith(f"{own}/tokenizer: kept as it is; it was trained by")
    os.utime(own / "a.txt")  # touched, not changed
    assert standing(own) == (True, False, "")


def test_a_config_is_the_same_however_its_path_is_spelled(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own)
    (own / "b.txt").write_text("More.")
    for name in ("own.toml", "./own.toml", f"../{own.name}/own.toml"):
        assert vocabulary.standing(load_config(name), name) == (True, True, "")


def test_new_text_trains_it_again_unless_a_run_has_begun(own: Path) -> None:
    (own / "b.txt").write_text("More.")
    assert standing(own) == (True, True, "")
    (own / "run").mkdir()
    (own / "run/checkpoint.safetensors").touch()
    found = standing(own)
    assert (found.is_own, found.needs_training) == (True, False)
    assert f"{own}/b.txt is new: {own}/run was trained with it" in found.note
    before = (own / "tokenizer/tokenizer.json").read_bytes()
    with pytest.raises(UserError, match="b.txt is new: .*/run was trained with it; wanted another"):
        tokenizer.main(["--config", str(own / "own.toml")])
    assert (own / "tokenizer/tokenizer.json").read_bytes() == before


def test_a_training_that_is_killed_between_its_files_can_be_done_again(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    (own / "b.txt").write_text("More. " * 20)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenizer.Tokenizer, "save", killed)
        tokenizer.main(["--config", str(own / "own.toml")])
    assert standing(own) == (True, True, "")  # the old one is still there
    tokenizer.main(["--config", str(own / "own.toml")])
    assert standing(own) == (True, False, "")


def test_a_vocabulary_whose_text_is_gone_stays(own: Path) -> None:
    (own / "a.txt").unlink()
    assert standing(own) == (True, False, "")


@pytest.mark.parametrize("change", ["no record", "other file", "other config", "damaged record"])
def test_a_vocabulary_that_the_config_has_not_trained_is_never_trained_over(
    own: Path, change: str
) -> None:
    file, record = own / "tokenizer/tokenizer.json", own / "tokenizer" / vocabulary.RECORD
    name = "own.toml"
    if change == "no record":
        record.unlink()
    elif change == "other file":
        file.write_text(json.dumps(json.loads(file.read_text())))
    elif change == "damaged record":
        record.write_text("{}")
    else:
        name = "other.toml"
        (own / name).write_text(CONFIG.format(folder=own, size=270))
    before = file.read_bytes()
    assert not standing(own, name).is_own and "kept as it is" in standing(own, name).note
    with pytest.raises(UserError, match="found a vocabulary that .* has not trained; wanted"):
        tokenizer.main(["--config", str(own / name)])
    assert file.read_bytes() == before


def test_no_folder_has_no_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert vocabulary.find("") is None
    assert vocabulary.find(".") == Path("tokenizer.json")

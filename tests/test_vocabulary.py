"""Vocabularies: trained once, again when text or settings change, and never over another's."""

import json
import os
from pathlib import Path

import pytest

from gptchat.console import UserError
from gptchat.data import tokenizer

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


class Own:
    """A folder with text, a config and the vocabulary that it has trained."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.folder = folder
        self.capsys = capsys
        self.file = folder / "tokenizer/tokenizer.json"
        (folder / "a.txt").write_text("To be or not to be, that is the question. " * 20)
        (folder / "own.toml").write_text(CONFIG.format(folder=folder, size=280))
        assert "280 entries" in self.train()

    def train(self, *overrides: str) -> str:
        """What the command prints."""
        tokenizer.main(["--config", str(self.folder / "own.toml"), *overrides])
        return self.capsys.readouterr().out

    def refused(self, *overrides: str) -> str:
        """The line that refuses; the vocabulary stays."""
        before = self.file.read_bytes()
        with pytest.raises(UserError) as error:
            self.train(*overrides)
        assert self.file.read_bytes() == before
        return str(error.value)

    def begin_run(self) -> None:
        (self.folder / "run").mkdir()
        (self.folder / "run/checkpoint.safetensors").touch()


@pytest.fixture
def own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Own:
    return Own(tmp_path, capsys)


def test_a_vocabulary_is_trained_once(own: Own) -> None:
    kept = f"{own.folder}/tokenizer: kept as it is; it was trained by these settings on this text\n"
    assert own.train() == kept
    os.utime(own.folder / "a.txt")  # touched, not changed
    assert own.train() == kept
    (own.folder / "a.txt").unlink()
    assert own.train() == kept


def test_other_settings_or_text_train_it_again(own: Own) -> None:
    assert "270 entries" in own.train("tokenizer.vocab_size=270")
    assert "280 entries" in own.train()
    (own.folder / "b.txt").write_text("More.")
    assert "280 entries" in own.train()


def test_a_vocabulary_that_a_run_has_begun_with_stays(own: Own) -> None:
    own.begin_run()
    assert "kept as it is" in own.train()
    assert "vocab_size was 280 and is 270: it is the vocabulary of" in own.refused(
        "tokenizer.vocab_size=270"
    )
    (own.folder / "b.txt").write_text("More.")
    assert "b.txt is new: it is the vocabulary of" in own.refused()


def test_a_vocabulary_of_another_run_stays(own: Own) -> None:
    assert "kept as it is" in own.train("run=elsewhere")
    assert "vocab_size was 280" in own.refused("run=elsewhere", "tokenizer.vocab_size=270")


@pytest.mark.parametrize("change", ["no record", "damaged record", "other file", "GPT-2's files"])
def test_a_vocabulary_that_was_not_trained_here_stays(own: Own, change: str) -> None:
    record = own.folder / "tokenizer/manifest.json"
    if change == "no record":
        record.unlink()
    elif change == "damaged record":
        record.write_text("{}")
    elif change == "other file":
        own.file.write_text(json.dumps(json.loads(own.file.read_text())))
    else:
        own.file.unlink()
        (own.folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    before = {path.name: path.read_bytes() for path in own.file.parent.iterdir()}
    assert "kept as it is; it was not trained here" in own.train("tokenizer.vocab_size=270")
    assert {path.name: path.read_bytes() for path in own.file.parent.iterdir()} == before


def test_a_training_that_is_killed_between_its_files_can_be_done_again(
    own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    (own.folder / "b.txt").write_text("More. " * 20)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenizer.Tokenizer, "save", killed)
        own.train()
    assert "280 entries" in own.train()
    assert "kept as it is" in own.train()


def test_a_run_that_starts_from_a_model_trains_none(own: Own) -> None:
    own.file.unlink()
    assert "out/lm/model: its vocabulary is used" in own.train("init_from=out/lm/model")
    assert not own.file.exists()

"""Data that changed, is damaged or makes no sense is told in one line, never trained on."""

from pathlib import Path

import pytest
from conftest import CONFIG, run


def swap_first_and_last_document(path: Path) -> None:
    """Another order of the same documents: as many bytes, and as many tokens."""
    first, *others, last = path.read_text().rstrip("\n").split("\n\n")
    path.write_text("\n\n".join([last, *others, first]) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_run_does_not_go_on_with_edited_text_of_as_many_tokens(
    small: Path, tmp_path: Path, split: str
) -> None:
    (tmp_path / "tokenizer").symlink_to(small / "tokenizer")
    for name in ("train", "valid", "test"):
        path = tmp_path / f"data/lm/{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (small / f"data/lm/{name}.txt").read_text().splitlines()
        path.write_text("\n\n".join(lines[1:20]) + "\n")
    config = tmp_path / "lm.toml"
    config.write_text(CONFIG.format(task="lm", ending="txt", folder=tmp_path))
    run("train", "--config", config, "train.num_steps=4")
    swap_first_and_last_document(tmp_path / f"data/lm/{split}.txt")
    output = run("train", "--config", config, "train.num_steps=6", status=2)
    assert f"error: {tmp_path}/out/lm/checkpoint.safetensors: the data is no" in output
    assert f"text.{split} was" in output

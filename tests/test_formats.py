"""Text and dialogues as people bring them: JSON, other encodings, spreadsheets, odd names."""

import gzip
import json
import lzma
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gptchat.config import load_run_config
from gptchat.console import UserError
from gptchat.data.check import check
from gptchat.data.dialogue import IGNORE, encode_example
from gptchat.data.dialogue_files import format_of, read_dialogues, read_prompts, texts_of
from gptchat.data.encoding import read_documents
from gptchat.data.reading import PIECE

CONFIG = """
task = "{task}"
[tokenizer]
dir = "{folder}/tokenizer"
[data]
train = ["{folder}/train*"]
valid = ["{folder}/valid*"]
[model]
n_layer = 1
n_head = 1
n_embd = 8
n_ctx = 16
[train]
num_steps = 1
"""
Messages = list[dict[str, Any]]


def sharegpt(*texts: str, **keys: Any) -> dict[str, Any]:
    speakers = ("human", "gpt") * len(texts)
    turns = [{"from": who, "value": text} for who, text in zip(speakers, texts, strict=False)]
    return {"conversations": turns, **keys}


def documents(path: Path) -> list[str]:
    return [text for text, _ in read_documents(path, "block", PIECE)]


def report(folder: Path, task: str) -> Any:
    (folder / "own.toml").write_text(CONFIG.format(task=task, folder=folder))
    return check(load_run_config(str(folder / "own.toml")))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["export.json", "export.txt", "export.json.gz"])
def test_an_array_of_dialogues_is_read_whatever_its_ending(
    tmp_path: Path, name: str, indent: int | None
) -> None:
    path = tmp_path / name
    rows = [sharegpt(f"Question {i}?", f"Answer\n{i}. " + "x" * (i % 500)) for i in range(1000)]
    data = ("\n" + json.dumps(rows, indent=indent) + "\n").encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    expected = [[message["value"] for message in row["conversations"]] for row in rows]
    assert [[text for _, text in turns] for turns in read_dialogues(path)] == expected
    assert list(texts_of(path)) == ["\n".join(texts) for texts in expected]
    first, second = list(read_prompts(path))[:2]
    assert first.place == f"{path}:{2 if indent is None else 3}"
    answered = tmp_path / "answered.jsonl"
    answered.write_text(format_of(path).answered(second.entry, "Yes."))
    (prompt,) = read_prompts(answered)
    assert prompt.turns[-1] == (1, "Yes.")


def test_lines_of_json_are_dialogues_whatever_their_ending(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(json.dumps(sharegpt("Hi", "Hello")) for _ in range(3)))
    assert list(read_dialogues(path)) == [[(0, "Hi"), (1, "Hello")]] * 3


@pytest.mark.parametrize("as_array", [False, True])
def test_objects_with_text_are_documents_of_an_lm(tmp_path: Path, as_array: bool) -> None:
    path = tmp_path / "text.json"
    texts = ["One.\n\nStill one.", "Two.", " ", "Three \u65e5."]
    rows = [{"text": text, "id": 1} for text in texts]
    path.write_text(json.dumps(rows) if as_array else "\n".join(map(json.dumps, rows)))
    assert documents(path) == [texts[0], texts[1], texts[3]]
    assert list(texts_of(path)) == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(sharegpt("Hi", "Hello")), ":1: found an object with conversations; wanted pl"),
        ('[{"name": "chat", "id": 1}]', ":1: found an object with name, id; wanted plain text"),
        ('{"text": "a"}\n{"text": "b"', ":2: column 13: found no JSON"),
        ('[{"text": "a"},\n{"text": "b"}', ":2: column 1: found no JSON"),
        ('{"text": "\\ud800"}', ":1: text: found half a surrogate pair"),
    ],
)
def test_other_json_is_refused_as_text(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        documents(path)


@pytest.mark.parametrize("text", ["[Enter HAMLET]\n\nTo be.", "{smiles} Hi!", "[1, 2]", "{}\n"])
def test_text_in_brackets_is_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "play.txt"
    path.write_text(text)
    assert "\n\n".join(documents(path)) == text.rstrip("\n")


def targets(turns: Any, which: str) -> list[int]:
    """The ids that are learned; the nth turn is the id 10 + n."""
    ids = [(speaker, [10 + i]) for i, (speaker, _) in enumerate(turns)]
    example = encode_example(ids, 4, 5, 100, which)
    assert set(example.token_type_ids.tolist()) <= {0, 1}
    return [id for id in example.targets.tolist() if id != IGNORE and id >= 10]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_messages_that_are_not_to_be_learned_are_no_targets(
    tmp_path: Path, mark: dict[str, Any]
) -> None:
    messages: Messages = []
    for i, is_learned in enumerate([True, False, True, False]):
        messages.append({"role": "user", "content": f"Question {i}?"})
        messages.append({"role": "assistant", "content": f"Answer {i}."})
        messages[-1] |= {} if is_learned else mark
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    (turns,) = read_dialogues(path)
    assert [text for _, text in turns][-1] == "Answer 2." and len(turns) == 6
    assert targets(turns, "response") == [15]
    assert targets(turns, "responder") == [11, 15]
    assert targets(turns, "turns") == [11, 12, 14, 15]
    assert targets(turns, "all") == [11, 12, 14, 15]
    assert [speaker for speaker, _ in next(read_prompts(path)).turns] == [0, 1] * 4
    path.write_text(json.dumps({"messages": messages[2:4]}))
    assert list(read_dialogues(path)) == []  # nothing of it is to be learned
    path.write_text(json.dumps({"messages": [messages[0], {**messages[1], "weight": 0.5}]}))
    with pytest.raises(UserError, match=r":1: messages\[1\].weight: found 0.5; wanted 0 or 1"):
        list(read_dialogues(path))


def test_a_rows_system_is_its_first_turn_and_check_counts_keys_that_nothing_reads(
    tmp_path: Path,
) -> None:
    path = tmp_path / "train.json"
    row = sharegpt("Hi", "Hello", system="Be kind.", id=7)
    row["conversations"][0]["mood"] = "good"
    path.write_text(json.dumps([row] * 3))
    assert list(read_dialogues(path))[0] == [(0, "Be kind."), (0, "Hi"), (1, "Hello")]
    (tmp_path / "valid.tsv").write_text("a\tb\n")
    found = report(tmp_path, "chatlm")
    assert dict(found.unread_keys) == {"id": 3, "conversations[].mood": 3}


OTHER = {
    "utf16": ("Hello.\n".encode("utf-16"), "found UTF-16; wanted UTF-8"),
    "utf16 without a mark": (("Hello." * 50).encode("utf-16-le"), "found NULs; wanted UTF-8"),
    "latin1": ("Caf\u00e9.\n".encode("latin-1"), "byte 3: found invalid UTF-8 in line 1; wanted"),
    "latin1 and old line ends": (
        b"a\rb\r\nCaf\xe9.",
        "byte 8: found invalid UTF-8 in line 3; wanted",
    ),
    "xz": (lzma.compress(b"Hello."), "found xz data; wanted text"),
    "gzip": (gzip.compress(b"Hello."), "found gzip data; wanted text, or a name that ends in .gz"),
}


@pytest.mark.parametrize("task", ["lm", "chatlm"])
@pytest.mark.parametrize("kind", [*OTHER, "zip", "gzip in gzip"])
def test_files_that_are_no_utf8_are_told_for_what_they_are(
    tmp_path: Path, kind: str, task: str
) -> None:
    path = tmp_path / ("train.txt.gz" if kind == "gzip in gzip" else "train.txt")
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "Hello.")
        message = "found a zip archive; wanted the files in it"
    else:
        data, message = OTHER[kind.partition(" in")[0]]
        path.write_bytes(gzip.compress(data) if kind == "gzip in gzip" else data)
    (tmp_path / "valid.txt").write_text("a\tb\n")
    assert report(tmp_path, task).refusals[0].startswith(f"{path}: {message}")


def test_what_shows_a_spreadsheet_is_told(tmp_path: Path) -> None:
    (tmp_path / "valid.tsv").write_text("Why?\tSo.\n")
    table = tmp_path / "train.tsv"
    table.write_text("id\tquestion\tanswer\n" + "".join(f"{i}\tHow?\tSo.\n" for i in range(9)))
    warnings = report(tmp_path, "chatlm").warnings
    assert f"{table}: the first row looks like a header (id, question, answer)" in warnings
    assert f"{table}: the first column numbers the rows" in warnings
    table.write_text('"Well, how?"\t"So, so."\n' * 3)
    warnings = report(tmp_path, "chatlm").warnings
    assert f'{table}: most rows have a field in quotes ("), which are learned' in warnings
    table.write_text('How?\tSo.\nText\t"Yes", he said.\n42\tIt is.\n')
    assert report(tmp_path, "chatlm").warnings == []


def test_names_that_are_not_utf8_are_printed(tmp_path: Path) -> None:
    name = os.fsdecode(b"train-\xe9.tsv")
    (tmp_path / name).write_text("alone\n" * 50)
    (tmp_path / "valid.tsv").write_text("a\tb\n")
    (tmp_path / "own.toml").write_text(CONFIG.format(task="chatlm", folder=tmp_path))
    command = [sys.executable, "-m", "gptchat", "check", "--config", str(tmp_path / "own.toml")]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 2 and rb"train-\udce9.tsv:1: found one column" in done.stdout


def test_arrays_take_flat_memory_and_an_endless_item_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[{"text": "' + "x" * 2_000_000 + '"}]')
    with pytest.raises(UserError, match=":1: found no object that ends within 1,000,000 char"):
        documents(path)

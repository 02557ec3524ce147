"""`gptchat check`: what is odd in own data is found, counted and placed before training begins."""

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from gptchat.config import load_config
from gptchat.data import check, scan
from gptchat.data.encoding import read_documents
from gptchat.data.shard_writer import main as shards_main

CONFIG = """
task = "{task}"
[tokenizer]
dir = "{folder}/tokenizer"
[data]
train = ["{folder}/train*"]
valid = ["{folder}/valid*"]
shards = "{folder}/shards"
[model]
n_layer = 1
n_head = 1
n_embd = 8
n_ctx = 16
[train]
num_steps = 1
"""


class Data:
    """A folder of own data and its config."""

    def __init__(self, folder: Path, task: str, capsys: pytest.CaptureFixture[str]):
        self.folder = folder
        self.capsys = capsys
        self.config = folder / "own.toml"
        self.config.write_text(CONFIG.format(task=task, folder=folder))

    def write(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def check(self, *arguments: str, status: int = 0) -> str:
        found = 0
        try:
            check.main(["--config", str(self.config), *arguments])
        except SystemExit as exit:
            found = int(exit.code or 0)
        output = self.capsys.readouterr().out
        assert found == status, output
        return output

    def as_json(self, *arguments: str, status: int = 0) -> dict[str, Any]:
        return json.loads(self.check("--json", *arguments, status=status))


@pytest.fixture
def text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Data:
    data = Data(tmp_path, "lm", capsys)
    data.write("train.txt", "One.\n\nTwo.\n\nThree.\n")
    data.write("valid.txt", "Four.\n")
    return data


@pytest.fixture
def talks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Data:
    data = Data(tmp_path, "chatlm", capsys)
    data.write("train.tsv", "Hi!\tHello.\nWho?\tMe.\n")
    data.write("valid.tsv", "Why?\tSo.\n")
    return data


def test_clean_data_is_fine_in_five_lines(text: Data) -> None:
    output = text.check()
    assert len(output.splitlines()) == 5 and output.endswith("verdict: fine\n")
    assert "4 documents (train 3, valid 1, test 0), about 5 tokens" in output
    assert "no tokenizer yet" in output


def test_duplicates_and_overlap_are_counted(text: Data) -> None:
    text.write("train2.txt", "Two.\n\nOne.\n\nTwo.\n\nFive.\n")
    text.write("valid.txt", "Three.\n\nSix.\n")
    report = text.as_json()
    assert (report["duplicates"], report["overlap"]) == (3, {"valid": 1, "test": 0})
    assert "3 duplicates in train" in report["warnings"]
    assert "1 documents of valid are in train, too" in report["warnings"]


def test_long_documents_that_are_cut_at_other_places_are_duplicates(
    text: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "BLOCK", 64)
    long = "Words of a long document. " * 20 + "End."
    text.write("train.txt", f"One.\n\n{long}\n\nTwo and three.\n\n{long}\n")
    text.write("valid.txt", f"A first one.\n\n{long}\n")
    report = text.as_json()
    assert (report["duplicates"], report["overlap"]["valid"]) == (1, 1)


def test_duplicate_dialogues_are_found_whatever_their_format(talks: Data) -> None:
    messages = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]
    talks.write("train.jsonl", json.dumps({"messages": messages}))
    assert talks.as_json()["duplicates"] == 1


def test_a_file_named_twice_or_in_two_splits_is_told(text: Data) -> None:
    (text.folder / "train-again.txt").symlink_to(text.folder / "train.txt")
    (text.folder / "valid-too.txt").symlink_to(text.folder / "valid.txt")
    warnings = text.as_json(f"data.test={text.folder}/train.txt")["warnings"]
    assert any("train.txt is named twice by [data] train" in line for line in warnings)
    assert f"{text.folder}/train.txt is in train and in test" in warnings


def test_odd_characters_are_counted_and_placed_by_line(text: Data) -> None:
    name = text.write("train.txt", b"One.\r\nA \0 NUL.\n\nold\rline\rends\r\n")
    (file, _) = text.as_json()["files"]
    assert file["warnings"] == {
        "lone CR": {"count": 2, "places": [f"{name}:4"]},
        "NUL": {"count": 1, "places": [f"{name}:2"]},
    }


def test_a_lone_cr_at_the_end_of_a_block_or_file_counts_once(
    text: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (1, 2, 3, 100):
        monkeypatch.setattr(scan, "BLOCK", size)
        text.write("train.txt", b"a\rb\r\nc\r")
        assert text.as_json()["files"][0]["warnings"]["lone CR"]["count"] == 2


def test_what_looks_private_is_found_and_dates_are_not(text: Data) -> None:
    name = text.write(
        "train.txt",
        "Write to jane.doe@example.org.\nOr call (555) 123-4567, +44 20 7946 0958.\n"
        "Card 4111 1111 1111 1111, account 123456789.\n"
        "On 2024-01-02 10:11, in 1914-1918 and 1990 2000 2010, at 12.50, a @mention, 1,000,000.\n",
    )
    found = text.as_json()["files"][0]["warnings"]
    assert found["e-mail address"] == {"count": 1, "places": [f"{name}:1"]}
    assert found["number that looks private"]["count"] == 4
    assert set(found["number that looks private"]["places"]) == {f"{name}:2", f"{name}:3"}


def test_numbers_in_groups_are_found_as_without_possessive_repetitions() -> None:
    plain = re.compile(scan.NUMBER.pattern.replace("}+", "}"))
    draw = random.Random(1)
    for _ in range(20_000):
        text = "".join(draw.choices("0123456789 .-)x", k=draw.randint(9, 40)))
        found = [match.span() for match in scan.NUMBER.finditer(text)]
        assert found == [match.span() for match in plain.finditer(text)]


def test_all_that_training_would_refuse_is_told_at_once(talks: Data) -> None:
    name = talks.write(
        "train.tsv", "Hi!\tHello.\nalone\n  \tblank\n\nNUL\0\ttext\nok\tyes\nagain\n"
    )
    report = talks.as_json(status=2)
    file = report["files"][0]
    assert file["n_documents"] == 2
    assert [finding["count"] for finding in file["refusals"].values()] == [2, 1, 1]
    places = [finding["places"][0] for finding in file["refusals"].values()]
    assert places[0].startswith(f"{name}:2: found one column")
    assert places[1].startswith(f"{name}:3: found white space alone in column 1")
    assert places[2].startswith(f"{name}:5: found a NUL character")
    assert "verdict: training would refuse this: " in talks.check(status=2)


def test_mixed_encodings_are_placed_and_the_rest_is_still_read(text: Data) -> None:
    name = text.write("train.txt", "Café.\n\nOne.\n\n".encode() + "Café.\n\nTwo.".encode("latin-1"))
    report = text.as_json(status=2)
    (file, _) = report["files"]
    assert file["refusals"] == {"invalid UTF-8": {"count": 1, "places": [f"{name}:5 (byte 17)"]}}
    assert file["n_documents"] == 4


def test_a_damaged_gzip_file_and_a_missing_one_are_told(text: Data) -> None:
    text.write("train2.txt.gz", gzip.compress(b"text " * 1000)[:-9])
    refusals = text.as_json("data.test=no/such.txt", status=2)["refusals"]
    assert any("train2.txt.gz: found damaged gzip data" in line for line in refusals)
    assert "no/such.txt: no such file, named by [data] test" in refusals


def test_long_rows_and_what_is_cut_of_them(talks: Data) -> None:
    turn = "word " * 20  # about 25 tokens, of a context of 16
    talks.write("train.tsv", f"Hi!\tHello.\n{turn}\t{turn}\n")
    report = talks.as_json()
    assert report["files"][0]["long_rows"] == 1
    assert report["files"][0]["cut_tokens"] == 25 + 1 + 25 - 16
    assert "long rows: about 1 are longer than 16 tokens, of which 35 tokens" in talks.check()


@pytest.mark.parametrize(("targets", "cut"), [("response", True), ("responder", False)])
def test_nothing_is_cut_of_a_long_row_that_is_read_in_parts(
    talks: Data, targets: str, cut: bool
) -> None:
    talks.write("train.tsv", "\t".join(["Hello you"] * 20) + "\n")  # 2 tokens a turn, about
    report = talks.as_json(f"data.targets={targets}")
    assert report["files"][0]["long_rows"] == 1
    assert (report["files"][0]["cut_tokens"] > 0) == cut
    assert any("cut to the context" in warning for warning in report["warnings"]) == cut


def test_no_valid_data_is_an_error_before_anything_is_read(text: Data) -> None:
    with pytest.raises(Exception, match=r"\[data\] valid: found no files named"):
        text.check("data.valid=[]")
    with pytest.raises(Exception, match=r"\[data\] valid: found no files named"):
        shards_main(["--config", str(text.config), "data.valid=[]"])


def test_an_empty_split_would_be_refused(text: Data) -> None:
    text.write("valid.txt", "\n \n")
    refusals = text.as_json(status=2)["refusals"]
    assert refusals == [f"{text.folder}/valid*: found no text; wanted some for [data] valid"]


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_an_empty_entry_of_weighted_files_would_be_refused(text: Data, held_out: float) -> None:
    names = [
        text.write("train.txt", "\n\n".join(f"Document {i}." for i in range(100))),
        text.write("train-empty.txt", "\n  \n"),
    ]
    own = [f"data.train={json.dumps(names)}", "data.weights=[1.0, 1.0]"]
    if held_out:
        own += [f"data.held_out={held_out}", "data.valid=[]"]
    (refusal,) = text.as_json(*own, status=2)["refusals"]
    assert refusal.startswith(f"{names[1]}: found no ") and "train-1" in refusal
    assert text.as_json(own[0], *own[2:])["refusals"] == []


def test_a_held_out_share_is_counted_by_split(text: Data) -> None:
    text.write("train.txt", "\n\n".join(f"Document {i}." for i in range(1000)))
    report = text.as_json("data.valid=[]", "data.held_out=0.1")
    documents = report["documents"]
    assert sum(documents.values()) == 1000 and report["overlap"] == {"valid": 0, "test": 0}
    assert 70 < documents["valid"] < 130 and 70 < documents["test"] < 130


def test_verbose_names_files_and_places(text: Data) -> None:
    name = text.write("train.txt", "One.\n\nMail a@b.cd\n")
    assert f"  1 x e-mail address: {name}:3\n" in text.check("--verbose")


def test_documents_are_those_of_training(text: Data) -> None:
    content = "\ufeff\n \na\r\nb\n\n  \n  c\n\n\nd\ne\n\n"
    path = Path(text.write("train.txt", content))
    config = load_config(str(text.config))
    for document in ("block", "line", "file"):
        expected = len([1 for _, ends in read_documents(path, document, 1000) if ends])
        found = text.as_json(f"data.document={document}")["files"][0]["n_documents"]
        assert found == expected, config

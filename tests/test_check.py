"""`gptchat check`: what is odd in own data is found, counted and placed before training begins."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from gptchat.config import load_run_config
from gptchat.data import check
from gptchat.data.encoding import read_documents

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

    def __init__(self, folder: Path, task: str):
        self.folder = folder
        self.config = str(folder / "own.toml")
        Path(self.config).write_text(CONFIG.format(task=task, folder=folder))

    def write(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def report(self, *overrides: str) -> check.Report:
        return check.check(load_run_config(self.config, overrides))


@pytest.fixture
def text(tmp_path: Path) -> Data:
    data = Data(tmp_path, "lm")
    data.write("train.txt", "One.\n\nTwo.\n\nThree.\n")
    data.write("valid.txt", "Four.\n")
    return data


@pytest.fixture
def talks(tmp_path: Path) -> Data:
    data = Data(tmp_path, "chatlm")
    data.write("train.tsv", "Hi!\tHello.\nWho?\tMe.\n")
    data.write("valid.tsv", "Why?\tSo.\n")
    return data


def test_the_command_prints_figures_refusals_and_a_verdict(
    talks: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    check.main(["--config", talks.config])
    lines = capsys.readouterr().out.splitlines()
    assert "2 files, 0.00 MB, 3 dialogues (train 2, valid 1, test 0), about 6 tok" in lines[0]
    assert len(lines) == 4 and lines[-1] == "verdict: fine"
    name = talks.write("train.tsv", "Hi!\tHello.\nalone\n")
    with pytest.raises(SystemExit) as ended:
        check.main(["--config", talks.config])
    problem = f"{name}:2: found one column; wanted turns divided by tabs, the response last"
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 2
    assert lines[-2:] == [
        f"refused: {problem}",
        f"verdict: training would refuse this: {problem}",
    ]


def test_duplicates_and_overlap_are_counted_however_documents_are_read(text: Data) -> None:
    long = "Words of a document longer than a piece. " * 4000 + "End."
    text.write("train2.txt", f"Two.\n\nOne.\n\nTwo.\n\n{long}\n\nFive.\n\n{long}\n")
    text.write("valid.txt", f"Three.\n\nSix.\n\nA first one.\n\n{long}\n")
    report = text.report()
    assert (report.duplicates, report.overlap) == (4, {"valid": 2, "test": 0})
    assert "4 duplicates in train" in report.warnings
    assert "2 documents of valid are in train, too" in report.warnings


def test_duplicate_dialogues_are_found_whatever_their_format(talks: Data) -> None:
    messages = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]
    talks.write("train.jsonl", json.dumps({"messages": messages}))
    assert talks.report().duplicates == 1


def test_all_that_training_would_refuse_is_told_at_once(talks: Data) -> None:
    name = talks.write(
        "train.tsv", "Hi!\tHello.\nalone\n  \tblank\n\nNUL\0\ttext\nok\tyes\nagain\n"
    )
    talks.write("train2.tsv.gz", gzip.compress(b"text\tagain\n" * 1000)[:-9])
    talks.write("valid2.tsv", b"a\tb\nCaf\xe9\tb\n")
    report = talks.report("data.test=no/such.tsv")
    assert report.documents["train"] == 2
    for line, start in zip(
        report.refusals,
        [
            "no/such.tsv: no such file, named by [data] test",
            f"{name}:2: found one column; wanted turns divided by tabs, the response last "
            "(and 1 like it)",
            f"{name}:3: found no text in column 1",
            f"{name}:5: found a NUL character",
            f"{talks.folder}/train2.tsv.gz: found damaged gzip data",
            f"{talks.folder}/valid2.tsv: byte 7: found invalid UTF-8 in line 2",
            "no/such.tsv: found no text; wanted some for [data] test",
        ],
        strict=True,
    ):
        assert line.startswith(start)


@pytest.mark.parametrize(("targets", "cut"), [("response", True), ("responder", False)])
def test_long_rows_are_counted_and_what_is_cut_unless_they_are_read_in_parts(
    talks: Data, targets: str, cut: bool
) -> None:
    talks.write("train.tsv", "\t".join(["Hello you"] * 20) + "\n")  # 2 tokens a turn, about
    report = talks.report(f"data.targets={targets}")
    assert (report.long_rows, report.cut_rows) == (1, int(cut))
    assert ("1 rows cut to the context" in report.warnings) == cut


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_an_empty_split_or_weighted_entry_would_be_refused(text: Data, held_out: float) -> None:
    names = [
        text.write("train.txt", "\n\n".join(f"Document {i}." for i in range(100))),
        text.write("train-empty.txt", "\n  \n"),
    ]
    own = [f"data.train={json.dumps(names)}", "data.weights=[1.0, 1.0]"]
    if held_out:
        own += [f"data.held_out={held_out}", "data.valid=[]"]
    (refusal,) = text.report(*own).refusals
    assert refusal.startswith(f"{names[1]}: found no ") and "train-1" in refusal
    assert text.report(own[0], *own[2:]).refusals == []


def test_a_held_out_share_is_counted_by_split(text: Data) -> None:
    text.write("train.txt", "\n\n".join(f"Document {i}." for i in range(1000)))
    report = text.report("data.valid=[]", "data.held_out=0.1")
    documents = {split: report.documents[split] for split in ("train", "valid", "test")}
    assert sum(documents.values()) == 1000 and report.overlap == {"valid": 0, "test": 0}
    assert 70 < documents["valid"] < 130 and 70 < documents["test"] < 130


def test_documents_are_those_of_training(text: Data) -> None:
    path = text.write("train.txt", "\ufeff\n \na\r\nb\n\n  \n  c\n\n\nd\ne\n\n")
    for document in ("block", "line", "file"):
        expected: Any = len([1 for _, ends in read_documents(path, document, 1000) if ends])
        assert text.report(f"data.document={document}").documents["train"] == expected

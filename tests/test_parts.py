"""Parts of the shards: together they hold what one run writes, and nothing foreign joins them."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from hf_models import byte_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptchat.config import Config, DataConfig, TokenizerConfig
from gptchat.console import UserError
from gptchat.data import parts
from gptchat.data.encoding import read_documents
from gptchat.data.parts import Part, parse_part, sources_of
from gptchat.data.reading import Span
from gptchat.data.shard_writer import write
from gptchat.data.shards import open_shards, verify
from gptchat.files import lock_folder

PROSE = "First lines\r\nof a document.\r\n\r\nSecond,\n  in é日\n \n\nThird\n\n\n\nlast one\n" * 5
ROWS = "Hi!\tHello, you.\nHow are you?\tFine.\tGood to hear\\nthat.\r\n\nä\tb\n" * 9
ROWS += "".join(f"question {i}\tanswer {i}\n" for i in range(20))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """An LM's config with two files for training and one for validation."""
    byte_tokenizer().save(tmp_path / "tokenizer")
    for name, text in (("a", PROSE), ("b", "no line end"), ("c", PROSE + "x"), ("v", PROSE)):
        (tmp_path / f"{name}.txt").write_bytes(text.encode())
    train = tuple(str(tmp_path / f"{name}.txt") for name in "abc")
    data = DataConfig(train=train, valid=(str(tmp_path / "v.txt"),), shards=str(tmp_path / "out"))
    return Config(tokenizer=TokenizerConfig(dir=str(tmp_path / "tokenizer")), data=data)


def chat_of(config: Config, tmp_path: Path) -> Config:
    (tmp_path / "rows.tsv").write_bytes(ROWS.encode())
    data = dataclasses.replace(config.data, train=(str(tmp_path / "rows.tsv"),), valid=())
    return dataclasses.replace(config, task="chatlm", data=data)


def moved(config: Config, folder: Path, **changes: object) -> Config:
    data = dataclasses.replace(config.data, shards=str(folder), **changes)
    return dataclasses.replace(config, data=data)


def content(config: Config, split: str = "train") -> list[object]:
    """All that can be read of a split."""
    shards = open_shards(config, split, byte_tokenizer())
    ids = shards.tokens(0, shards.n_tokens).tolist()
    sizes = [shards.n_tokens, shards.documents, shards.n_bytes]
    arrays = [shards.starts.tolist(), shards.turns.tolist(), shards.speakers.tolist()]
    dialogues = []
    if config.task == "chatlm":
        dialogues = [shards.dialogue(number) for number in range(shards.documents)]
    return [ids, sizes, arrays, dialogues]


@pytest.mark.parametrize("document", ["block", "line", "file"])
@pytest.mark.parametrize("total", [1, 2, 7, 40])
def test_parts_hold_together_what_one_run_writes(config, tmp_path, document, total):
    config = moved(config, tmp_path / "whole", document=document)
    write(config)
    in_parts = moved(config, tmp_path / "parts")
    for number in reversed(range(1, total + 1)):
        write(in_parts, part=Part(number, total))
    for split in ("train", "valid"):
        assert content(in_parts, split) == content(config, split)
    assert verify(in_parts) == {}


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_parts_of_dialogues_hold_together_what_one_run_writes(config, tmp_path, held_out):
    config = moved(chat_of(config, tmp_path), tmp_path / "whole", held_out=held_out)
    write(config)
    in_parts = moved(config, tmp_path / "parts")
    for number in range(1, 6):
        write(in_parts, part=Part(number, 5))
    assert content(in_parts) == content(config)


def test_windows_across_parts_are_those_of_one_stream(config, tmp_path):
    for number in range(1, 8):
        write(config, part=Part(number, 7))
    shards = open_shards(config, "train", byte_tokenizer())
    whole = shards.tokens(0, shards.n_tokens).tolist()
    assert len(shards.files) == 7
    for start in range(0, len(whole), 11):
        assert shards.tokens(start, start + 200).tolist() == whole[start : start + 200]


@settings(derandomize=True, max_examples=200, deadline=None)
@example(text="\ufeff \na\rb \nb \n\r\n \r\n\v", total=2, document="block", block=9)
@given(
    text=st.text("ab\n\r\v é\ufeff", max_size=40),
    total=st.integers(1, 9),
    document=st.sampled_from(["block", "line", "file"]),
    block=st.integers(1, 9),
)
def test_parts_meet_between_documents(tmp_path_factory, text, total, document, block):
    path = tmp_path_factory.getbasetemp() / "parts.txt"
    path.write_bytes(text.encode())
    config = Config(data=DataConfig(document=document))
    whole = list(read_documents(path, document, 1000))
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "BLOCK", block)
        for number in range(1, total + 1):
            for source in sources_of([path], Part(number, total), config):
                found += list(read_documents(source, document, 1000))
    if text:
        assert found == whole


def test_a_missing_part_is_named_and_done_again_alone(config, tmp_path):
    for number in (1, 2, 3):
        write(config, part=Part(number, 3))
    expected = content(config)
    shutil.rmtree(tmp_path / "out" / "part-00002-of-00003")
    with pytest.raises(UserError, match=r"part-00002.*; run `gptchat shards --part 2/3"):
        content(config)
    (tmp_path / "out" / "part-00002-of-00003").mkdir()
    (tmp_path / "out" / "part-00002-of-00003" / "train-00000.bin.tmp").write_bytes(b"killed")
    write(config, part=Part(2, 3))
    assert content(config) == expected
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_foreign_part_is_refused_in_one_line(config, tmp_path):
    for number in (1, 2):
        write(config, part=Part(number, 2))
    part = tmp_path / "out" / "part-00002-of-00002"
    other = moved(config, tmp_path / "other", train=config.data.train[:1])
    foreign = write(other, part=Part(2, 2)) and tmp_path / "other" / part.name
    other_kind = moved(config, tmp_path / "kind", document="line")
    write(other_kind, part=Part(2, 2))
    for source, wanted in (
        (foreign, "found a part of other files than part-00001-of-00002"),
        (tmp_path / "kind" / part.name, "found shards of document 'line'; wanted 'block'"),
        (tmp_path / "out" / "part-00001-of-00002", "found a part of other files"),
    ):
        shutil.move(part, tmp_path / "aside")
        shutil.copytree(source, part)
        with pytest.raises(UserError, match=wanted) as error:
            content(config)
        assert "\n" not in str(error.value) and "--part 2/2" in str(error.value)
        shutil.rmtree(part)
        shutil.move(tmp_path / "aside", part)
    assert content(config)


def test_parts_of_a_file_that_changed_between_them_are_refused(config, tmp_path):
    write(config, part=Part(1, 2))
    path = Path(config.data.train[0])
    path.write_bytes(path.read_bytes().replace(b"Third", b"Drei!"))
    path = Path(config.data.train[2])
    path.write_bytes(path.read_bytes().replace(b"Third", b"Drei!"))
    write(config, part=Part(2, 2))
    with pytest.raises(UserError, match="before or after it changed|as it was before it changed"):
        content(config)


def test_parts_of_one_file_in_two_states_are_refused_where_it_is_gone(config, tmp_path):
    config = moved(config, tmp_path / "out", train=config.data.train[:1])
    write(config, part=Part(1, 2))
    path = Path(config.data.train[0])
    path.write_bytes(path.read_bytes().replace(b"Third", b"Drei!"))
    write(config, part=Part(2, 2))
    path.unlink()
    with pytest.raises(UserError, match=r"found a part of .*a\.txt as it was before or after") as e:
        content(config)
    assert "part-00002-of-00002" in str(e.value) and "\n" not in str(e.value)


def test_folders_of_other_names_are_no_parts(config, tmp_path):
    others = ("part-00000-of-old", "part-00001-of-00002-backup", "part-00000-of-00000")
    for name in others:
        (tmp_path / "out" / name).mkdir(parents=True)
    assert parts.parts_in(tmp_path / "out") == []
    write(config, part=Part(2, 2))
    write(config, part=Part(1, 2))
    assert parts.parts_in(tmp_path / "out") == [Part(1, 2), Part(2, 2)]
    assert content(config) and verify(config) == {}


def test_a_split_that_is_empty_in_all_parts_is_verified_and_not_opened(config):
    config = moved(config, config.shards_dir, held_out=1e-9)
    write(config, part=Part(1, 1))
    assert verify(config) == {}
    with pytest.raises(UserError, match="found no document for test with"):
        content(config, "test")


def test_whole_shards_and_parts_do_not_mix(config):
    write(config, part=Part(1, 2))
    for part in (None, Part(1, 3)):
        with pytest.raises(UserError, match="found part-00001-of-00002; wanted"):
            write(config, part=part)
    shutil.rmtree(config.shards_dir)
    write(config)
    with pytest.raises(UserError, match="found whole shards; wanted parts of 2"):
        write(config, part=Part(1, 2))


def test_parts_are_written_at_the_same_time_but_not_with_whole_shards(config):
    busy = "another process is writing shards here"
    with lock_folder(config.shards_dir, "busy", shared=True):
        write(config, part=Part(2, 2))
        shutil.rmtree(config.shards_dir / "part-00002-of-00002")
        with pytest.raises(UserError, match=busy):
            write(config)
    with lock_folder(config.shards_dir, "busy"), pytest.raises(UserError, match=busy):
        write(config, part=Part(1, 2))
    write(config)


def test_an_error_in_a_part_names_the_line_of_the_file(config, tmp_path):
    config = chat_of(config, tmp_path)
    path = Path(config.data.train[0])
    n_lines = ROWS.count("\n")
    path.write_bytes(ROWS.encode() + b"alone\n")
    with pytest.raises(UserError, match=rf"rows.tsv:{n_lines + 1}: found one column"):
        write(config, part=Part(4, 4))
    path.write_bytes(ROWS.encode() + b"a\xff\tb\n")
    place = f"byte {len(ROWS.encode()) + 1}: found invalid UTF-8 in line {n_lines + 1}"
    with pytest.raises(UserError, match=place):
        write(config, part=Part(4, 4))


def test_parts_are_named_as_they_are_asked_for(tmp_path):
    assert parse_part("3/16").folder == "part-00003-of-00016"
    for wrong in ("0/3", "4/3", "3", "a/b", "1/0", "-1/3", "1/3/5"):
        with pytest.raises(UserError, match="--part: found"):
            parse_part(wrong)
    (tmp_path / "x.txt").write_text("a\n\nb\n\nc\n\nd")
    spans = sources_of([tmp_path / "x.txt"], Part(2, 2), Config())
    assert spans == [Span(tmp_path / "x.txt", 6, 10)]

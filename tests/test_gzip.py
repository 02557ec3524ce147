"""Compressed files: the same text, wherever text is read or written."""

import gzip
from pathlib import Path

import pytest

from gptchat.artifacts import file_digest
from gptchat.config import Config, DataConfig, TokenizerConfig
from gptchat.console import UserError
from gptchat.data import reading
from gptchat.data.dialogue_files import read_dialogues
from gptchat.data.reading import filled_lines, read_text, text_size
from gptchat.data.shards import write
from gptchat.data.tokenizer import train_tokenizer

TEXT = "".join(f"Line {i} of the text, naïve 日本語.\r\n" + "\n" * (i % 3) for i in range(5000))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The same text, plain and compressed in two members."""
    plain, packed = tmp_path / "own.txt", tmp_path / "own.txt.gz"
    data = TEXT.encode()
    plain.write_bytes(data)
    packed.write_bytes(gzip.compress(data[:70_001]) + gzip.compress(data[70_001:]))
    return plain, packed


def test_text_and_lines_are_those_of_the_plain_file(files: tuple[Path, Path]) -> None:
    plain, packed = files
    assert text_size(packed) == text_size(plain) == plain.stat().st_size
    assert "".join(read_text(packed, 1000)) == "".join(read_text(plain, 1000))
    assert list(filled_lines(packed)) == list(filled_lines(plain))


def test_vocabulary_and_shards_are_those_of_the_plain_file(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    hashes, shards = set(), []
    for path in files:
        settings = TokenizerConfig(
            dir=str(tmp_path / f"vocabulary-{path.name}"), vocab_size=300, files=(str(path),)
        )
        tokenizer = train_tokenizer(settings)
        tokenizer.save(settings.dir)
        hashes.add(tokenizer.hash)
        data = DataConfig(train=(str(path),), shards=str(tmp_path / f"shards-{path.name}"))
        meta = write(Config(tokenizer=settings, data=data))
        shards.append(
            {key: meta["splits"]["train"][key] for key in ("files", "bytes", "documents")}
        )
        state = meta["splits"]["train"]["inputs"][str(path)]
        assert state["digest"] == file_digest(path)  # of the file as it is
    assert len(hashes) == 1 and shards[0] == shards[1]


def test_dialogues_of_both_formats_may_be_compressed(tmp_path: Path) -> None:
    line = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    for name, text in (("x.tsv.gz", "a\tb\n"), ("x.jsonl.gz", line), ("x.JSONL.GZ", line)):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()))
        assert list(read_dialogues(path)) == [[(0, "a"), (1, "b")]]


@pytest.mark.parametrize("damage", ["cut", "flipped", "plain", "behind"])
def test_a_damaged_file_is_told_in_one_line(files: tuple[Path, Path], damage: str) -> None:
    path = files[1]
    data = path.read_bytes()
    damaged = {
        "cut": data[:-20],
        "flipped": data[:-5] + bytes([data[-5] ^ 255]) + data[-4:],  # in the check sum
        "plain": b"no gzip at all",
        "behind": data + b"more",
    }
    path.write_bytes(damaged[damage])
    for read in (lambda: list(filled_lines(path)), lambda: text_size(path)):
        with pytest.raises(UserError, match="own.txt.gz: found damaged gzip data .*; wanted"):
            read()


def test_places_are_those_in_the_text(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv.gz"
    path.write_bytes(gzip.compress(b"a\tb\nalone\n"))
    with pytest.raises(UserError, match="x.tsv.gz:2: found one column"):
        list(read_dialogues(path))
    path.write_bytes(gzip.compress(b"a\tb\n\xff\n"))
    with pytest.raises(UserError, match="x.tsv.gz: byte 4: found invalid UTF-8 in line 2"):
        list(read_dialogues(path))


def test_what_is_written_is_compressed_if_its_name_says_so(tmp_path: Path) -> None:
    for name in ("x.tsv", "x.tsv.gz"):
        (tmp_path / name).write_bytes(reading.to_bytes("a\tb\n", tmp_path / name))
        assert list(filled_lines(tmp_path / name)) == [(1, "a\tb")]

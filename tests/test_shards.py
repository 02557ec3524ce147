"""Shards: what is written is what the tokenizer says, in flat memory; nothing else is opened."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import wait_until
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptchat.artifacts import MANIFEST, lock_folder
from gptchat.config import Config, DataConfig, TokenizerConfig
from gptchat.console import RunFailed, UserError
from gptchat.data import encoding, shards
from gptchat.data.encoding import Encoder, read_documents
from gptchat.data.scripts import WORDS, pre_tokenizer
from gptchat.data.shards import open_shards, write
from gptchat.data.tokenizer import Tokenizer, train_tokenizer

PROSE = """It is good to see you again, isn't it? We've walked 12 miles today.

Ça va bien, merci!  Two  spaces, a\ttab
and a second line of the same document.

日本語の文章です。 😎 The end.

def f(x):
        if x:
                return   x
"""
WHITE = (
    " \n\t\r\v\f\x1c\x1d\x1e\x1f\x85\xa0"
    "\u1680\u180e\u2003\u2028\u2029\u202f\u205f\u200b\u3000\ufeff"
)
texts = st.text(
    st.one_of(
        st.sampled_from("ab's1.²日本のーケé\u0301" + WHITE),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=40,
)
quick = settings(derandomize=True, deadline=None, max_examples=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with prose, dialogues and two tokenizers."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "prose.txt").write_text(PROSE * 20, encoding="utf-8")
    (folder / "chat.tsv").write_text(
        "Hi!\tHello, you.\nHow are you?\tFine.\tGood to hear\\nthat.\n", encoding="utf-8"
    )
    for name, vocab_size in (("bpe", 400), ("smaller", 300)):
        found = TokenizerConfig(vocab_size=vocab_size, files=(str(folder / "prose.txt"),))
        train_tokenizer(found).save(folder / name)
    return folder


@pytest.fixture
def lm(folder, tmp_path):
    """A config whose only split is the prose."""
    return Config(
        tokenizer=TokenizerConfig(dir=str(folder / "bpe")),
        data=DataConfig(train=(str(folder / "prose.txt"),), shards=str(tmp_path / "lm")),
    )


@pytest.fixture
def chat(lm, folder, tmp_path):
    return replace(
        lm,
        task="chatlm",
        data=DataConfig(train=(str(folder / "chat.tsv"),), shards=str(tmp_path / "chat")),
    )


def tokenizer_of(config):
    return Tokenizer.load(config.tokenizer.dir)


def opened(config):
    return open_shards(config, "train", tokenizer_of(config))


def with_text(config, tmp_path, text, **changes):
    """The config, its training text being this one."""
    path = tmp_path / "own.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return replace(config, data=replace(config.data, train=(str(path),), **changes))


def refused(config, *wanted):
    """Opening is refused in one line with all of these strings."""
    with pytest.raises(UserError) as error:
        opened(config)
    line = str(error.value)
    assert "\n" not in line and "gptchat shards --config" in line
    assert all(part in line for part in wanted), line


@pytest.mark.parametrize(
    "document, expected",
    [
        ("block", ["a\nb", "  c", "d\ne"]),
        ("line", ["a", "b", "  c", "d", "e"]),
        ("file", ["a\nb\n\n  \n  c\n\n\nd\ne"]),
    ],
)
def test_documents_are_encoded_and_each_is_followed_by_eos(lm, tmp_path, document, expected):
    config = with_text(
        lm, tmp_path, "\ufeff\n \na\r\nb\n\n  \n  c\n\n\nd\ne\n\n", document=document
    )
    write(config)
    found, tokenizer = opened(config), tokenizer_of(config)
    documents = [found.tokens(*found.starts[i : i + 2]).tolist() for i in range(found.documents)]
    assert documents == [tokenizer.encode(text) + [tokenizer.eos_id] for text in expected]
    assert found.n_bytes == sum(len(text.encode()) for text in expected)
    assert found.n_tokens == sum(map(len, documents))


def test_dialogues_come_back_with_their_speakers(chat):
    write(chat)
    found, tokenizer = opened(chat), tokenizer_of(chat)
    dialogues = [
        [(speaker, tokenizer.decode(ids)) for speaker, ids in found.dialogue(i)]
        for i in range(found.documents)
    ]
    assert dialogues == [
        [(0, "Hi!"), (1, "Hello, you.")],
        [(1, "How are you?"), (0, "Fine."), (1, "Good to hear\nthat.")],
    ]


def test_tsv_and_jsonl_may_be_mixed_and_speakers_are_those_of_the_roles(chat, folder, tmp_path):
    messages = [("system", "Be brief."), ("user", "Hi!"), ("user", "You?"), ("assistant", "Yes.")]
    line = json.dumps({"messages": [{"role": r, "content": t} for r, t in messages]})
    (tmp_path / "roles.jsonl").write_text(line)
    paths = (str(folder / "chat.tsv"), str(tmp_path / "roles.jsonl"))
    config = replace(chat, data=replace(chat.data, train=paths))
    write(config)
    found, tokenizer = opened(config), tokenizer_of(config)
    assert found.documents == 3
    turns = [(speaker, tokenizer.decode(ids)) for speaker, ids in found.dialogue(2)]
    assert turns == [(0, "Be brief."), (0, "Hi!"), (0, "You?"), (1, "Yes.")]


def test_text_like_a_special_token_stays_text(lm, tmp_path):
    config = with_text(lm, tmp_path, "[EOS] and [SEP]")
    write(config)
    ids = opened(config).tokens(0, opened(config).n_tokens).tolist()
    assert ids.count(tokenizer_of(config).eos_id) == 1


@pytest.mark.parametrize("pattern", ["gpt2", "script"])
def test_encoding_by_words_equals_encoding_whole_texts(folder, pattern):
    backend = Tokenizer.load(folder / "bpe").backend
    backend.pre_tokenizer = pre_tokenizer(pattern)
    encoder = Encoder(Tokenizer(backend))
    assert encoder.pattern is WORDS[pattern]

    @quick
    @given(st.lists(texts, max_size=4))
    @example(
        [f"a{white}{white} b{white}c {white}" for white in WHITE]
        + [f"a    {white}b" for white in WHITE]
    )
    def check(texts):
        ids = [np.frombuffer(data, encoder.dtype).tolist() for data in encoder.encode(texts)]
        assert ids == encoder.tokenizer.encode_batch(texts)

    check()


def test_cached_words_are_bounded(folder, monkeypatch):
    monkeypatch.setattr(encoding, "MAX_CACHED", 900)
    encoder = Encoder(Tokenizer.load(folder / "bpe"))
    for i in range(20):
        encoder.encode([" ".join(f"word{j}" for j in range(i * 10, i * 10 + 10))])
        assert sum(map(len, encoder.words)) <= 900
    encoder.encode(["x" * 1000])
    assert not encoder.words


@quick
@given(
    st.text("ab \n", max_size=60), st.sampled_from(["block", "line", "file"]), st.integers(8, 30)
)
def test_documents_do_not_depend_on_the_block_size(tmp_path_factory, text, document, size):
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_text(text)
    joined, piece = [], ""
    if max((len(run) for run in text.replace("a", "b").split("b")), default=0) >= size:
        return  # longer white space than a block may be cut
    for part, ends in read_documents(path, document, size):
        piece += part
        if ends:
            joined, piece = [*joined, piece], ""
    assert joined == [text for text, _ in read_documents(path, document, 1000)] and not piece


@pytest.mark.parametrize("document", ["block", "line", "file"])
def test_a_document_of_white_space_alone_is_left_out(tmp_path, document):
    path = tmp_path / "white.txt"
    for text in ("\n  ", " \n \n\t", "\n\n \v", "  ", "\u3000\n\u3000", "\n" * 9 + " " * 9):
        path.write_bytes(text.encode())
        for size in (1, 4, 1000):
            assert list(read_documents(path, document, size)) == [], (text, size)


def test_a_document_longer_than_a_block_has_the_same_tokens(lm, tmp_path, monkeypatch):
    config = with_text(lm, tmp_path, PROSE.replace("\n\n", "\n") * 10 + "日" * 300)
    write(config)
    whole = opened(config).tokens(0, opened(config).n_tokens).tolist()
    monkeypatch.setattr(encoding, "BLOCK", 350)
    write(config)
    assert opened(config).tokens(0, opened(config).n_tokens).tolist() == whole
    assert opened(config).starts.tolist() == [0, len(whole)]


def test_processes_and_a_thread_write_the_same_bytes(lm, tmp_path, monkeypatch):
    config = with_text(lm, tmp_path, PROSE * 300)
    write(config)
    alone = {path.name: path.read_bytes() for path in config.shards_dir.iterdir()}
    monkeypatch.setattr(encoding, "BLOCK", 10_000)
    monkeypatch.setattr(encoding, "PARALLEL_BYTES", 0)
    pools = []
    monkeypatch.setattr(
        encoding,
        "ProcessPoolExecutor",
        lambda *args, **options: pools.append(ProcessPoolExecutor(*args, **options)) or pools[-1],
    )
    write(config)
    assert len(pools) == 1
    assert {path.name: path.read_bytes() for path in config.shards_dir.iterdir()} == alone


def test_a_large_vocabulary_takes_32_bits(lm, monkeypatch):
    write(lm)
    small = opened(lm)
    ids = small.tokens(0, small.n_tokens)
    assert ids.dtype == np.uint16
    monkeypatch.setattr(encoding, "UINT16_ENTRIES", 99)
    write(lm)
    large = opened(lm)
    assert large.tokens(0, 3).dtype == np.uint32
    assert large.tokens(0, large.n_tokens).tolist() == ids.tolist()
    assert large.starts.tolist() == small.starts.tolist()


def test_wrong_text_is_refused_with_its_place(lm, chat, tmp_path):
    for config, text, place in (
        (lm, b"good\n\nb\xffd", "own.txt: byte 7"),
        (chat, b"a\tb\nalone\n", "own.txt:2"),
        (lm, b"a" * 100 + b"\xc3", "own.txt: byte 100"),
        (lm, b" \n\n \n", "no text"),
    ):
        with pytest.raises(UserError, match=place):
            write(with_text(config, tmp_path, text))
        assert [path.name for path in config.shards_dir.iterdir()] == [".lock"]


def test_shards_that_something_else_made_are_refused(lm, folder, tmp_path):
    refused(lm, MANIFEST)
    write(lm)
    Tokenizer.load(folder / "bpe").save(tmp_path / "other")
    other = Tokenizer.load(tmp_path / "other")
    other.backend.add_special_tokens(["[MORE]"])
    other.save(tmp_path / "other")
    refused(replace(lm, tokenizer=TokenizerConfig(dir=str(tmp_path / "other"))), "tokenizer was")
    refused(replace(lm, data=replace(lm.data, document="line")), "document was 'block'")
    refused(replace(lm, task="chatlm"), "document was 'block' and is 'row'")


def test_shards_of_other_or_changed_files_are_refused(lm, tmp_path):
    config = with_text(lm, tmp_path, "one two")
    write(config)
    refused(replace(config, data=replace(config.data, train=lm.data.train)), "prose.txt is new")
    path = tmp_path / "own.txt"
    time = path.stat().st_mtime_ns
    path.write_text("one two three")
    os.utime(path, ns=(time, time))  # of another size
    refused(config, "own.txt has changed")
    path.write_text("one two")
    os.utime(path, ns=(1, 1))
    assert opened(config).documents == 1
    path.write_text("two one")  # of the same size
    refused(config, "own.txt has changed")
    path.unlink()
    assert opened(config).documents == 1  # shards may travel without their text


@pytest.mark.parametrize(
    "name", ["train-00000.bin", "train-documents.bin", "train-turns.bin", "train-speakers.bin"]
)
def test_a_truncated_or_missing_file_is_refused_by_name(chat, name):
    write(chat)
    path = chat.shards_dir / name
    path.write_bytes(path.read_bytes()[:-1])
    refused(chat, name, f"{path.stat().st_size:,} bytes")
    path.unlink()
    refused(chat, name)


def test_an_error_leaves_the_old_shards_and_no_rubbish(lm, monkeypatch):
    write(lm)
    before = {path.name: path.read_bytes() for path in lm.shards_dir.iterdir()}
    monkeypatch.setattr(
        os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match="No space left"):
        write(lm)
    assert {path.name: path.read_bytes() for path in lm.shards_dir.iterdir()} == before


def test_shards_of_which_only_some_were_renamed_are_refused(lm, tmp_path, monkeypatch):
    write(lm)
    monkeypatch.setattr(
        Path, "replace", lambda *paths: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    )
    with pytest.raises(UserError, match="not written"):
        write(lm)
    refused(lm, MANIFEST)


def flip_a_bit(path):
    """Change one bit in the middle of a file, and neither its size nor its time."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    "name",
    ["train-00000.bin", "train-documents.bin", "train-turns.bin", "train-speakers.bin", MANIFEST],
)
def test_a_zeroed_file_or_a_flipped_bit_is_refused_when_shards_are_opened(chat, name):
    write(chat)
    path = chat.shards_dir / name
    flip_a_bit(path)
    refused(chat, name)
    path.write_bytes(bytes(path.stat().st_size))
    refused(chat, name)


def test_text_edited_while_it_is_encoded_is_refused_when_the_shards_are_opened(
    lm, tmp_path, monkeypatch
):
    config = with_text(lm, tmp_path, "one two")

    def edit_then_read(paths, config, split):
        (tmp_path / "own.txt").write_text("two one")
        os.utime(tmp_path / "own.txt", ns=(2, 2))
        return encoding.read_blocks(paths, config, split)

    monkeypatch.setattr(shards, "read_blocks", edit_then_read)
    write(config)
    refused(config, "own.txt")


def test_the_digest_of_shards_tells_contents_apart_and_nothing_else(lm, tmp_path):
    config = with_text(lm, tmp_path, "one two")
    write(config)
    digest = opened(config).digest
    os.utime(tmp_path / "own.txt", ns=(1, 1))
    write(config)
    assert opened(config).digest == digest
    edited = with_text(lm, tmp_path, "two one")
    write(edited)
    assert opened(edited).digest != digest


def test_the_command_writes_what_is_missing_or_out_of_date(lm, tmp_path, capsys):
    config = with_text(lm, tmp_path, PROSE)
    path = write_config(config, tmp_path)
    shards.main(["--config", str(path)])
    assert "train: 4 documents" in capsys.readouterr().out
    before = {path.name: path.stat().st_mtime_ns for path in config.shards_dir.iterdir()}
    shards.main(["--config", str(path)])
    assert f"{config.shards_dir}: kept as it is; " in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in config.shards_dir.iterdir()} == before
    with_text(lm, tmp_path, PROSE * 2)
    shards.main(["--config", str(path)])
    assert "train: 7 documents" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["lm", "chatlm"])
def test_held_out_files_can_be_read_one_by_one(lm, folder, tmp_path, task):
    texts = ["One.\tTwo.\n\nThree.\tFour.\tFive.\n", "\n", "Six.\tSeven.\n"]
    names = [str(tmp_path / f"{number}.txt") for number in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        Path(name).write_text(text)
    data = DataConfig(test=tuple(names), shards=str(tmp_path / "all"))
    config = replace(lm, task=task, data=data)
    write(config)
    together = open_shards(config, "test", tokenizer_of(config)).by_source()
    assert list(together) == names and together[names[1]].documents == 0
    for name in (names[0], names[2]):
        data = DataConfig(test=(name,), shards=str(tmp_path / "alone"))
        write(replace(config, data=data))
        alone = open_shards(replace(config, data=data), "test", tokenizer_of(config))
        part = together[name]
        assert part.tokens(0, part.n_tokens).tolist() == alone.tokens(0, alone.n_tokens).tolist()
        assert (part.n_bytes, part.documents) == (alone.n_bytes, alone.documents)
        for field in ("starts", "turns", "speakers"):
            assert getattr(part, field).tolist() == getattr(alone, field).tolist()


def test_a_killed_worker_is_one_line(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "PARALLEL_BYTES", 0)

    def kill_workers_then_read(*arguments):
        n_blocks = 2 * encoding.granted_cores() + 1  # asked for when all workers have started
        yield from [[("Some text.", True)]] * n_blocks
        for worker in multiprocessing.active_children():
            worker.kill()
        yield from encoding.read_blocks(*arguments)

    monkeypatch.setattr(shards, "read_blocks", kill_workers_then_read)
    with pytest.raises(RunFailed, match="a process that encodes text was killed"):
        write(lm)
    assert [path.name for path in lm.shards_dir.iterdir()] == [".lock"]


def test_without_semaphores_one_process_encodes(lm, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoding, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(encoding, "ProcessPoolExecutor", refuse)
    write(lm)
    assert "warning: /dev/shm: No space left on device" in capsys.readouterr().err
    assert opened(lm).documents == 61


def test_a_second_process_that_writes_the_same_shards_is_refused(lm, tmp_path):
    config = with_text(lm, tmp_path, PROSE)
    write(config)
    before = {path.name: path.read_bytes() for path in config.shards_dir.iterdir()}
    with lock_folder(config.shards_dir, "busy"):
        config, process = run_cli(lm, tmp_path, PROSE)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (2, 1), err
    assert "another process is writing shards here" in err
    assert {path.name: path.read_bytes() for path in config.shards_dir.iterdir()} == before
    write(config)


def write_config(config, tmp_path):
    """The config as a file, with some text for valid besides."""
    valid = tmp_path / "valid.txt"
    valid.write_text("Hi!\tHeld out.\n")
    path = tmp_path / "run.toml"
    path.write_text(
        f"[tokenizer]\ndir = {json.dumps(config.tokenizer.dir)}\n"
        f"[data]\ntrain = {json.dumps(config.data.train)}\n"
        f"valid = {json.dumps(str(valid))}\n"
        f"shards = {json.dumps(config.data.shards)}\n"
        "[model]\nn_layer = 1\nn_head = 1\nn_embd = 8\nn_ctx = 8\n[train]\nnum_steps = 1\n"
    )
    return path


def run_cli(config, tmp_path, text):
    """The command on a config file with this training text."""
    config = with_text(config, tmp_path, text)
    path = write_config(config, tmp_path)
    return config, subprocess.Popen(
        [sys.executable, "-m", "gptchat", "shards", "--config", str(path)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def test_a_killed_run_leaves_nothing_half_made_and_no_process(lm, tmp_path):
    config, process = run_cli(lm, tmp_path, PROSE * 60_000)
    wait_until(lambda: len(list(config.shards_dir.glob("*.tmp"))) >= 2, process)
    os.kill(process.pid, signal.SIGKILL)
    try:
        # Its workers hold the pipes: this returns when they have ended, too.
        process.communicate(timeout=60)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.returncode is None else None
    left = [path for path in config.shards_dir.iterdir() if path.name != ".lock"]
    assert [path.suffix for path in left] == [".tmp", ".tmp"]
    refused(config, MANIFEST)
    write(with_text(lm, tmp_path, PROSE))
    assert opened(config).documents == 4 and not list(config.shards_dir.glob("*.tmp"))


@pytest.mark.parametrize("document", ["block", "row"])
def test_memory_is_flat_in_the_size_of_the_input(lm, chat, tmp_path, monkeypatch, document):
    monkeypatch.setattr(encoding, "PARALLEL_BYTES", 1 << 40)  # in this process, which is measured
    monkeypatch.setattr(encoding, "BLOCK", 1 << 14)
    peaks = []
    for blocks in (8, 64):
        lines = (PROSE.replace("\n", " ") + "\tYes.\n") * (blocks * (1 << 14) // len(PROSE))
        config = with_text(
            chat if document == "row" else lm,
            tmp_path,
            lines,
            **({} if document == "row" else {"document": document}),
        )
        tracemalloc.start()
        write(config)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 100_000

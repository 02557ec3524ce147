"""Round trips, special tokens, streaming, forbidden words, foreign vocabularies, training."""

import codecs
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gptchat.config import Config, TokenizerConfig
from gptchat.console import UserError
from gptchat.data import corpora
from gptchat.data import tokenizer as tokenizer_module
from gptchat.data.tokenizer import SPECIAL, Tokenizer, tokenizer_for, train_tokenizer
from gptchat.inference.text import BROKEN, CharacterFilter, StreamDecoder, WordFilter

PROPERTY = settings(derandomize=True, max_examples=150, deadline=None)
TYPED = (
    "[PAD]",
    "[SEP]",
    "[CLS]",
    " [EOS]",
    "[UNK]x",
    "<|endoftext|>",
    "\u65e5\u672c\u8a9e",
    "\U0001f469\u200d\U0001f4bb",
    "e\u0301",
    "\r\n",
    "  ",
    "hello",
    "\u0130",
    "\ufb01",
    "\x00",
    "'ll",
)
TEXT = st.lists(st.sampled_from(TYPED) | st.text(max_size=8), max_size=8).map("".join)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "speech.txt"
    foreign = "\n\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3001caf\u00e9 \U0001f600\n" * 50
    path.write_text("\n\n".join(corpora.speeches()[-4:]) + foreign, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bpe(text_file: Path) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=700, files=(str(text_file),)))


def test_special_tokens_come_first_and_every_byte_has_an_entry(bpe: Tokenizer) -> None:
    tokenizer = bpe
    assert tuple(map(tokenizer.backend.id_to_token, range(6))) == SPECIAL
    assert tuple(tokenizer.special_ids.values()) == tuple(range(6))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.cls_id, tokenizer.sep_id) == (0, 3, 4, 5)
    assert tokenizer.vocab_size == len(tokenizer.token_bytes) == 700
    assert {bytes([byte]) for byte in range(256)} <= set(tokenizer.token_bytes)
    tokenizer.require_specials()


@PROPERTY
@given(text=TEXT)
def test_any_text_comes_back_without_special_tokens(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert not ids or min(ids) >= len(SPECIAL)
    assert (
        bpe.backend.decode(ids, skip_special_tokens=False) == text
    )  # the library's decoder agrees


def streamed(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    decoder = StreamDecoder(tokenizer, stop)
    return [*(decoder.push(id) for id in ids), decoder.finish()]


@PROPERTY
@given(text=TEXT, single=st.booleans())
def test_a_stream_never_holds_half_a_character(bpe: Tokenizer, text: str, single: bool) -> None:
    ids = (
        [bpe.token_bytes.index(bytes([byte])) for byte in text.encode()]
        if single
        else bpe.encode(text)
    )
    pieces, sent = streamed(bpe, ids), b""
    assert "".join(pieces) == text
    for id, piece in zip(
        ids, pieces, strict=False
    ):  # each character leaves with its last byte, not later
        sent += bpe.token_bytes[id]
        text_so_far = sent.decode(errors="ignore")
        assert text_so_far.endswith(piece)
    assert "".join(pieces[:-1]) == text


@PROPERTY
@given(ids=st.lists(st.integers(0, 699) | st.integers(100, 262), max_size=30))
def test_a_stream_of_any_ids_joins_to_the_plain_decode_but_for_an_unfinished_end(
    bpe: Tokenizer, ids: list[int]
) -> None:
    data = b"".join(bpe.token_bytes[id] for id in ids)
    whole, _ = codecs.utf_8_decode(data, "replace", False)
    assert "".join(streamed(bpe, ids)) == whole
    assert bpe.decode(ids) in (whole, whole + "\ufffd")


def tokenized(tokenizer: Tokenizer, text: str, seed: int) -> list[int]:
    """One of the many tokenizations of a text: greedy pieces of random lengths, down to a byte."""
    generator, data, ids = random.Random(seed), text.encode(), []
    known = {piece: id for id, piece in enumerate(tokenizer.token_bytes) if piece}
    while data:
        longest = generator.randint(1, 8)
        n = next(n for n in range(min(longest, len(data)), 0, -1) if data[:n] in known)
        ids.append(known[data[:n]])
        data = data[n:]
    return ids


def cut_at_first_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)], True
    return text, False


@PROPERTY
@given(
    text=st.text(st.sampled_from("ab\n\u65e5\U0001f600\u0301"), max_size=20),
    seed=st.integers(0, 9),
    stops=st.lists(
        st.text(st.sampled_from("ab\n\u65e5\U0001f600\u0301"), min_size=1, max_size=4), max_size=3
    ),
)
def test_stop_strings_cut_the_text_whatever_the_tokens(
    bpe: Tokenizer, text: str, seed: int, stops: list[str]
) -> None:
    decoder = StreamDecoder(bpe, stops)
    joined = "".join(decoder.push(id) for id in tokenized(bpe, text, seed)) + decoder.finish()
    assert (joined, decoder.stopped) == cut_at_first_stop(text, stops)
    assert decoder.push(bpe.encode("a")[0]) + decoder.finish() == "" or not decoder.stopped


def test_empty_stop_strings_and_words_are_refused(bpe: Tokenizer) -> None:
    for make in (StreamDecoder, WordFilter):
        with pytest.raises(ValueError, match="must not be empty"):
            make(bpe, ("fine", ""))


ALPHABET = "aeth \u65e5\u672c"


@PROPERTY
@given(
    text=st.text(st.sampled_from(ALPHABET), max_size=12),
    seed=st.integers(0, 9),
    words=st.lists(
        st.text(st.sampled_from(ALPHABET), min_size=1, max_size=6), min_size=1, max_size=3
    ),
)
def test_banned_are_the_tokens_that_complete_a_word(
    bpe: Tokenizer, text: str, seed: int, words: list[str]
) -> None:
    ids = tokenized(bpe, text, seed)
    before = text.encode()
    completing = []
    for id, piece in enumerate(bpe.token_bytes):
        after = before + piece
        if any(
            after[:end].endswith(word.encode())
            for word in words
            for end in range(len(before) + 1, len(after) + 1)
        ):
            completing.append(id)
    banned = WordFilter(bpe, words).banned(ids)
    assert sorted(banned) == completing and len(set(banned)) == len(banned)


ENDS = (b"", b"\x80", b"\x80\x80", b"\xa0\x80", b"\x80\x80\x80", b"\x90\x80\x80")


def is_beginning_of_text(data: bytes) -> bool:
    """Whether UTF-8 text can begin with these bytes."""
    for end in ENDS:
        with suppress(UnicodeDecodeError):
            (data + end).decode()
            return True
    return False


@PROPERTY
@given(text=st.text(max_size=6), cut=st.integers(0, 3))
@example(text="\ud7ff\ue000\u0800", cut=1)
@example(text="\U0010ffff", cut=2)
@example(text="\U00010000", cut=3)
def test_forbidden_are_the_ids_that_break_a_character(bpe: Tokenizer, text: str, cut: int) -> None:
    data = text.encode()
    data = data[: len(data) - cut]
    ids = [bpe.token_bytes.index(bytes([byte])) for byte in data]
    characters = CharacterFilter(bpe, bpe.vocab_size + 2)
    forbidden = characters.forbidden[characters.state(ids)].tolist()
    is_whole = codecs.utf_8_decode(data, "strict", False)[1] == len(data)
    for piece, is_forbidden in zip([*bpe.token_bytes, b"", b""], forbidden, strict=True):
        allowed = is_beginning_of_text(data + piece) if piece else is_whole
        assert is_forbidden != allowed


def test_a_special_token_ends_an_unfinished_character(bpe: Tokenizer) -> None:
    characters = CharacterFilter(bpe, bpe.vocab_size)
    half = [bpe.token_bytes.index(bytes([byte])) for byte in "\u65e5".encode()[:2]]
    assert characters.state(half) == 1 and characters.state([*half, bpe.sep_id]) == 0
    assert characters.state([half[1]]) == 0  # nothing that could be finished
    assert not characters.forbidden[BROKEN].any()


@pytest.fixture
def foreign(bpe: Tokenizer, tmp_path: Path) -> Path:
    """GPT-2's layout: vocab.json, merges.txt, the end of text the last and only special entry."""
    state = json.loads(bpe.backend.to_str())["model"]
    pieces = [piece for piece in state["vocab"] if piece not in SPECIAL] + ["<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(
        json.dumps({piece: n for n, piece in enumerate(pieces)}), encoding="utf-8"
    )
    merges = "".join(" ".join(pair) + "\n" for pair in state["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    return tmp_path


def test_a_foreign_vocabulary_loads_as_it_is_and_can_be_completed(
    foreign: Path, bpe: Tokenizer
) -> None:
    tokenizer = Tokenizer.load(foreign)
    text = "The President, <|endoftext|> [SEP] \u65e5"
    assert tokenizer.encode(text) == [id - 6 for id in bpe.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.cls_id) == (695, 694, -1)
    with pytest.raises(
        UserError, match=r"found no \[PAD\], \[UNK\], \[BOS\], \[CLS\], \[SEP\]; wanted"
    ):
        tokenizer.require_specials()
    assert tokenizer.add_missing_specials() == ["[PAD]", "[UNK]", "[BOS]", "[CLS]", "[SEP]"]
    assert (tokenizer.pad_id, tokenizer.sep_id, tokenizer.eos_id, tokenizer.vocab_size) == (
        695,
        699,
        694,
        700,
    )
    assert tokenizer.add_missing_specials() == []
    assert tokenizer.encode("[SEP]") == [id - 6 for id in bpe.encode("[SEP]")]
    tokenizer.save(foreign / "completed")
    again = tokenizer_for(Config(init_from=str(foreign / "completed")))
    assert (
        again.hash
        == tokenizer.hash
        == tokenizer_for(Config(tokenizer=TokenizerConfig(dir=str(foreign)))).hash
    )
    assert again.special_ids == tokenizer.special_ids and again.decode([694, 699]) == ""


def test_saved_and_loaded_again_it_is_the_same(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "new", model_max_length=99)
    again = Tokenizer.load(tmp_path / "new")
    assert again.hash == bpe.hash and again.token_bytes == bpe.token_bytes
    assert again.encode("no [SEP] here") == bpe.encode("no [SEP] here")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_transformers_loads_it_with_the_same_ids(bpe: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = bpe
    ours.save(tmp_path, model_max_length=99)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (
        "Hello,  world!\n\t I'll",
        "\u65e5\u672c\u8a9e \U0001f600e\u0301 caf\u00e9",
        " x ",
        "don 't . stop",
    ):
        assert (
            theirs(text)["input_ids"] == ours.encode(text)
            and theirs.decode(ours.encode(text)) == text
        )
    for name, id in ours.special_ids.items():
        assert getattr(theirs, f"{name.strip('[]').lower()}_token_id") == id
    assert theirs.model_max_length == 99 and len(theirs) == ours.vocab_size


def not_byte_level(kind: str, vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    if kind == "sentencepiece":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif kind in ("lower case", "prefix space"):
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix space")
        backend.decoder = decoders.ByteLevel()
        backend.normalizer = normalizers.Lowercase() if kind == "lower case" else None
    return backend


@pytest.mark.parametrize("kind", ["words", "sentencepiece", "lower case", "prefix space"])
def test_a_tokenizer_that_loses_text_is_refused(bpe: Tokenizer, kind: str, tmp_path: Path) -> None:
    alphabet = {character: n for n, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    not_byte_level(kind, alphabet).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="does not give every text back; wanted byte-level BPE"):
        Tokenizer.load(tmp_path)


def test_missing_and_broken_files_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="found neither tokenizer.json nor merges.txt; `gptchat tokenizer`"
    ):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"\n', encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read as a tokenizer") as raised:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(raised.value)
    (tmp_path / "tokenizer.json").rename(tmp_path / "merges.txt")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        Tokenizer.load(tmp_path)


def test_of_much_text_a_part_of_each_file_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.tsv")]
    for name, word in zip(names, ("alpha ", "beta ", "gamma\t"), strict=True):
        Path(name).write_text((word * 8 + "end\n") * 6000)
    monkeypatch.setattr(tokenizer_module, "SAMPLE_BYTES", 250_000)
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=300, files=tuple(names)))
    assert {b"alpha", b" beta", b"gamma"} <= set(tokenizer.token_bytes)


def test_dialogues_train_a_vocabulary_by_their_turns_alone(tmp_path: Path) -> None:
    turns = ["To be,\tor not to be.", "That is the question."]
    messages = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant"), turns, strict=True)
    ]
    contents = {
        "a.txt": "\n".join(turns) + "\n",
        "a.tsv": "\t".join(turns).replace("\tor", "\\tor") + "\n",
        "a.jsonl": json.dumps({"messages": messages}) + "\n",
    }
    found = set()
    for name, content in contents.items():
        (tmp_path / name).write_text(content * 20)
        settings = TokenizerConfig(vocab_size=280, files=(str(tmp_path / name),))
        found.add(train_tokenizer(settings).hash)
    assert len(found) == 1


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b" \r\n \n"])
def test_files_without_text_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="empty.txt: found no text"):
        train_tokenizer(TokenizerConfig(vocab_size=300, files=(str(path),)))


def test_training_gives_the_same_bpe_in_another_process(
    text_file: Path, bpe: Tokenizer, tmp_path: Path
) -> None:
    config = tmp_path / "lm.toml"
    config.write_text(
        f'[tokenizer]\nfiles = "{text_file}"\ndir = "{tmp_path}/out"\n'
        "vocab_size = 700\n"
        "[model]\nn_layer = 1\nn_head = 1\nn_embd = 8\nn_ctx = 8\n[train]\nnum_steps = 1\n"
    )
    command = [sys.executable, "-m", "gptchat", "tokenizer", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert Tokenizer.load(tmp_path / "out").hash == bpe.hash and "700 entries" in done.stdout
    wrong = subprocess.run(
        [*command, "tokenizer.files=nowhere.txt"], capture_output=True, text=True, timeout=300
    )
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1) and "nowhere.txt" in wrong.stderr


def processor_seconds(pid: int) -> float:
    """What a running process has used of all processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_ctrl_c_ends_a_training_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=12)) for _ in range(1_000_000)]
    (tmp_path / "words.txt").write_text(" ".join(words))
    config = tmp_path / "lm.toml"
    config.write_text(
        f'[tokenizer]\nfiles = "{tmp_path}/words.txt"\ndir = "{tmp_path}/out"\n'
        "vocab_size = 60000\n"
        "[model]\nn_layer = 1\nn_head = 1\nn_embd = 8\nn_ctx = 8\n[train]\nnum_steps = 1\n"
    )
    command = [sys.executable, "-m", "gptchat", "tokenizer", "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    try:
        while processor_seconds(process.pid) < 6 and time.monotonic() < deadline:
            time.sleep(0.05)  # until the library has read the text, and counts
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=5)
    finally:
        process.kill()
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in err
    assert not list((tmp_path / "out").glob("*.json"))


def test_a_full_disk_is_told_in_one_line_and_keeps_the_old_tokenizer(
    bpe: Tokenizer, tmp_path: Path
) -> None:
    bpe.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code = (
        "import resource, sys; from gptchat.console import cli; "
        "from gptchat.data.tokenizer import Tokenizer; t = Tokenizer.load(sys.argv[1]); "
        "t.add_missing_specials(); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
        "cli(lambda: t.save(sys.argv[1], model_max_length=7))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "tokenizer.json: cannot be written" in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

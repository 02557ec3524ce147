"""Text -> token ids on disk, encoded once on all cores, then opened memory-mapped.

    python -m gptchat.shards --config configs/lm.toml [section.key=value ...]

For each split (train, valid, test) a folder of shards holds, all numbers little-endian:

    SPLIT-NNNNN.bin       token ids, uint16, or uint32 past 65,535 vocabulary entries; every file but the last has
                          SHARD_TOKENS of them, so a document may go on in the next file
    SPLIT-documents.bin   int64: 0, then where each document ends: a number of tokens (lm) or of turns (chatlm)
    SPLIT-turns.bin       int64: 0, then where each turn ends, a number of tokens (chatlm)
    SPLIT-speakers.bin    uint8: each turn's speaker (chatlm)

and `meta.json`: format, tokenizer's hash, counts, bytes of text, source files. All are written under temporary names;
`meta.json` is taken away before the first is renamed and comes back last. Memory stays flat: text is read, encoded and
written in blocks, of which a few are under way at once.

lm: each document is followed by [EOS]; what separates documents (line ends, blank lines) belongs to none, is no text.
chatlm: the ids of the turns only; special tokens, types and truncation are made by dialogue.py at batch time.
"""

import argparse
import codecs
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from glob import glob
from io import IncrementalNewlineDecoder
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from gptchat.config import Config, Progress, UserError, cli, expand, load, swapped
from gptchat.dialogue import Turn, read_rows, rows_to_turns
from gptchat.tokenizer import Tokenizer, for_config

A = TypeVar("A")
B = TypeVar("B")
FORMAT = 1
SPLITS = ("train", "valid", "test")
AGAIN = "run `python -m gptchat.shards --config FILE` with this run's config"
BLOCK = 1 << 20  # characters encoded at once
SHARD_TOKENS = 1 << 28
CACHED = 2_000_000  # characters of words in a cache
SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s of GPT-2's pattern, not Python's
WORDS = re.compile(rf" ?[^{SPACE}]+|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+")
SEPARATOR = {"block": r"\n(?:[^\S\n]*\n)+", "line": "\n", "file": "(?!)"}
BLANK_START = re.compile(r"\A(?:\s*\n|\s+\Z)")


class Encoded(NamedTuple):
    """What a block appends to each file; where documents and turns end is counted from the block's beginning."""
    tokens: bytes
    documents: np.ndarray
    turns: np.ndarray
    speakers: bytes
    n_bytes: int


def in_order(executor: Executor, function: Callable[[A], B], items: Iterable[A], ahead: int) -> Iterator[B]:
    """`map` in an executor with at most `ahead` items under way; results in the items' order."""
    pending: deque = deque()
    for item in items:
        pending.append(executor.submit(function, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def read_documents(path: Path, document: str, size: int) -> Iterator[tuple[str, bool]]:
    """(text, whether the document ends with it) for all that hold more than white space. One longer than `size` comes
    in pieces, cut where white space begins, which no byte-level token spans; anywhere if there is none.

    Raises UserError with file and byte for invalid UTF-8.
    """
    separator, decoder = re.compile(SEPARATOR[document]), codecs.getincrementaldecoder("utf-8-sig")()
    lines, rest, inside, data = IncrementalNewlineDecoder(decoder, translate=True), "", False, b" "
    with open(path, "rb") as file:
        while data:
            data = file.read(size)
            try:
                *texts, rest = separator.split(rest + lines.decode(data, not data))
            except UnicodeDecodeError as error:
                at = file.tell() - len(error.object) + error.start
                raise UserError(f"{path}: byte {at}: found invalid UTF-8 ({error.reason})") from None
            for text in texts if data else [*texts, rest.rstrip("\n")]:
                if inside or (text := BLANK_START.sub("", text)):
                    yield text, True
                inside = False
            if len(rest) >= size:
                rest = rest if inside else BLANK_START.sub("", rest)
                cut = re.match(r"(?s:.*)\S(?=\s)", rest)
                piece = rest[:cut.end() if cut else None]
                if data and piece:
                    yield piece, False
                    rest, inside = rest[len(piece):], True


def in_blocks(items: Iterable[A], length: Callable[[A], int]) -> Iterator[list[A]]:
    """Lists of items with BLOCK characters or a little more."""
    block, n = [], 0
    for item in items:
        block.append(item)
        n += length(item)
        if n >= BLOCK:
            yield block
            block, n = [], 0
    if block:
        yield block


def splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether no token spans the beginning of white space: byte-level with GPT-2's pattern, and nothing before it."""
    settings = json.loads(tokenizer.backend.to_str())
    step = settings["pre_tokenizer"] or {"type": None}
    return (step["type"] == "ByteLevel" and step["use_regex"] and not step["add_prefix_space"]
            and settings["normalizer"] is None and all(token["special"] for token in settings["added_tokens"]))


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 65535 else "<u4")


class Encoder:
    """Blocks -> ids. Where the tokenizer splits at white space, each distinct word is encoded once and then looked up:
    equal to encoding the whole text, and several times as fast."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.dtype, self.by_words = tokenizer, token_dtype(tokenizer), splits_at_spaces(tokenizer)
        self.words: dict[str, bytes] = {}
        self.n_cached = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Each text's ids, as bytes of the shards' dtype."""
        if not self.by_words:
            return self._encode_each(texts)
        split = [WORDS.findall(text) for text in texts]
        missing = list(set().union(*split) - self.words.keys())
        if 2 * len(missing) > sum(map(len, split)) > 10_000:  # hardly a word twice: numbers, say
            return self._encode_each(texts)
        self.words.update(zip(missing, self._encode_each(missing), strict=True))
        encoded = [b"".join(map(self.words.__getitem__, words)) for words in split]
        self.n_cached += sum(map(len, missing))
        if self.n_cached > CACHED:
            self.words, self.n_cached = {}, 0
        return encoded

    def _encode_each(self, texts: Sequence[str]) -> list[bytes]:
        return [np.array(ids, self.dtype).tobytes() for ids in self.tokenizer.encode_batch(texts)]

    def documents(self, block: list[tuple[str, bool]]) -> Encoded:
        """Pieces of text, an [EOS] behind each that ends a document."""
        texts, ended = zip(*block, strict=True)
        eos = self.dtype.type(self.tokenizer.eos_id).tobytes()
        ids = [data + eos * ends for data, ends in zip(self.encode(texts), ended, strict=True)]
        ends = self._ends(ids)[np.array(ended)]
        return Encoded(b"".join(ids), ends, ends[:0], b"", len("".join(texts).encode()))

    def rows(self, block: list[list[str]]) -> Encoded:
        """The turns of dialogues. Rows that tell a longer and longer history repeat turns: each is encoded once."""
        dialogues = [rows_to_turns(row) for row in block]
        speakers, texts = zip(*(turn for dialogue in dialogues for turn in dialogue), strict=True)
        distinct = list(dict.fromkeys(texts))
        encoded = dict(zip(distinct, self.encode(distinct), strict=True))
        ids = [encoded[text] for text in texts]
        documents = np.cumsum([len(dialogue) for dialogue in dialogues])
        return Encoded(b"".join(ids), documents, self._ends(ids), bytes(speakers), len("".join(texts).encode()))

    def _ends(self, ids: Sequence[bytes]) -> np.ndarray:
        return np.cumsum([len(data) // self.dtype.itemsize for data in ids])


_encoder: Encoder  # of this process


def _start_worker(config: Config) -> None:
    """Ctrl-C is the parent's to handle; a worker ends with its parent, even with a killed one."""
    global _encoder
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(for_config(config))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


def _encode(block: list[Any]) -> Encoded:
    return _encoder.documents(block) if isinstance(block[0], tuple) else _encoder.rows(block)


def _executor(config: Config, n_bytes: int) -> Executor:
    """Processes, or for little text a thread, which starts at once."""
    if n_bytes < 4 * BLOCK:
        return ThreadPoolExecutor(1, initializer=_start_worker, initargs=(config,))
    return ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), _start_worker, (config,))


class Writer:
    """The files of one split, under temporary names."""

    def __init__(self, prefix: str, dtype: np.dtype):
        self.prefix, self.itemsize = prefix, dtype.itemsize
        self.files: dict[str, BinaryIO] = {}
        self.counts = dict.fromkeys(("tokens", "documents", "turns", "bytes"), 0)

    def write(self, name: str, data: bytes | memoryview) -> None:
        if name not in self.files:
            self.files[name] = open(f"{self.prefix}{name}.bin.tmp", "wb")
        self.files[name].write(data)

    def append(self, block: Encoded) -> None:
        """Write what a block adds."""
        counts = self.counts
        self.write_ends("documents", block.documents + counts["turns" if block.speakers else "tokens"])
        if block.speakers:
            self.write_ends("turns", block.turns + counts["tokens"])
            self.write("speakers", block.speakers)
        data = memoryview(block.tokens)
        while data:
            number, used = divmod(counts["tokens"], SHARD_TOKENS)
            part = data[:(SHARD_TOKENS - used) * self.itemsize]
            self.write(f"{number:05d}", part)
            counts["tokens"] += len(part) // self.itemsize
            data = data[len(part):]
        for key, n in (("documents", len(block.documents)), ("turns", len(block.turns)), ("bytes", block.n_bytes)):
            counts[key] += n

    def write_ends(self, name: str, ends: np.ndarray) -> None:
        if name not in self.files:
            self.write(name, bytes(8))
        self.write(name, ends.astype("<i8").tobytes())

    def finish(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()


def header(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """What shards must have in common with the run that reads them."""
    return {"format": FORMAT, "task": config.task, "document": config.data.document if config.task == "lm" else "row",
            "tokenizer": tokenizer.hash, "dtype": token_dtype(tokenizer).str}


def write(config: Config) -> dict[str, Any]:
    """Encode the config's splits into its folder of shards; returns what is in `meta.json`.

    Raises UserError for files that are missing, hold no text, are not UTF-8 or (chatlm) no rows of dialogues.
    """
    folder, tokenizer = config.shards_dir, for_config(config)
    meta = header(config, tokenizer) | {"shard_tokens": SHARD_TOKENS, "splits": {}}
    named = {split: getattr(config.data, split) for split in SPLITS if getattr(config.data, split)}
    paths = {split: expand(patterns, f"[data] {split}") for split, patterns in named.items()}
    total = sum(path.stat().st_size for found in paths.values() for path in found)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _executor(config, total) as executor, Progress(total, "shards", "B") as bar:
            for split, found in paths.items():
                writer = Writer(f"{folder}/{split}-", token_dtype(tokenizer))
                for encoded in in_order(executor, _encode, _blocks(found, config), 2 * (os.cpu_count() or 1)):
                    writer.append(encoded)
                    bar.update(encoded.n_bytes + max(len(encoded.documents), len(encoded.turns)))
                writer.finish()
                if not writer.counts["documents"]:
                    raise UserError(f"{', '.join(named[split])}: found no text; wanted some for [data] {split}")
                meta["splits"][split] = writer.counts | {"sources": {str(path): path.stat().st_size for path in found}}
        _publish(folder, meta)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}; the shards were not written") from None
    finally:
        for path in folder.glob("*.bin.tmp"):
            path.unlink()
    return meta


def _blocks(paths: Iterable[Path], config: Config) -> Iterator[list[Any]]:
    if config.task == "chatlm":
        return in_blocks((row for path in paths for row in read_rows(path)), lambda row: sum(map(len, row)))
    pieces = (piece for path in paths for piece in read_documents(path, config.data.document, BLOCK))
    return in_blocks(pieces, lambda piece: len(piece[0]))


def _publish(folder: Path, meta: dict[str, Any]) -> None:
    """Replace the old files by the new ones."""
    (folder / "meta.json").unlink(missing_ok=True)
    for split in SPLITS:
        for path in folder.glob(f"{split}-*.bin"):
            path.unlink()
    for path in folder.glob("*.bin.tmp"):
        path.replace(path.with_suffix(""))
    with swapped(folder / "meta.json") as temporary:
        temporary.write_text(json.dumps(meta, indent=2) + "\n")


class Shards:
    """One split, memory-mapped: `n_tokens` ids in one stream, `n_bytes` of text, `documents` documents. Document i goes
    from `starts[i]` to `starts[i + 1]`; so do turns, by `turns`."""

    def __init__(self, folder: Path, split: str, meta: dict[str, Any]):
        counts = meta["splits"][split]
        self.task, self.shard_tokens = meta["task"], meta["shard_tokens"]
        self.n_tokens, self.n_bytes, self.documents = counts["tokens"], counts["bytes"], counts["documents"]
        prefix, turns = f"{folder}/{split}-", counts["turns"]
        self.files = [_open(f"{prefix}{i:05d}.bin", meta["dtype"], min(self.shard_tokens, self.n_tokens - start))
                      for i, start in enumerate(range(0, self.n_tokens, self.shard_tokens))]
        self.starts = _open(f"{prefix}documents.bin", "<i8", self.documents + 1)
        self.turns = _open(f"{prefix}turns.bin", "<i8", turns + 1) if turns else self.starts[:0]
        self.speakers = _open(f"{prefix}speakers.bin", "u1", turns) if turns else self.starts[:0]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The ids start..stop-1 of the stream."""
        first, offset = divmod(start, self.shard_tokens)
        parts = self.files[first:-(-stop // self.shard_tokens)]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts))[offset:offset + stop - start]

    def dialogue(self, number: int) -> list[Turn]:
        """The turns of a dialogue."""
        first, last = self.starts[number:number + 2].tolist()
        bounds = self.turns[first:last + 1].tolist()
        ids = self.tokens(bounds[0], bounds[-1]).tolist()
        return [(speaker, ids[start - bounds[0]:stop - bounds[0]]) for speaker, start, stop
                in zip(self.speakers[first:last].tolist(), bounds, bounds[1:], strict=False)]


def _open(path: str, dtype: str, n: int) -> np.ndarray:
    found, wanted = os.path.getsize(path) if os.path.exists(path) else 0, n * np.dtype(dtype).itemsize
    if found != wanted:
        raise UserError(f"{path}: found {found:,} bytes; wanted {wanted:,}; {AGAIN}")
    return np.asarray(np.memmap(path, dtype, "r"))


def open_shards(config: Config, split: str, tokenizer: Tokenizer) -> Shards:
    """The shards of a split. Raises UserError, naming the file, if they are missing, incomplete or made from something
    else: another tokenizer or format, other source files or changed ones (where those are still there)."""
    path, patterns = config.shards_dir / "meta.json", getattr(config.data, split)
    if not patterns:
        raise UserError(f"[data] {split}: found no files named; wanted some")
    try:
        meta = json.loads(path.read_text())
        different = {key: wanted for key, wanted in header(config, tokenizer).items() if meta.get(key) != wanted}
        sources = meta["splits"].get(split, {}).get("sources")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: found no readable meta.json ({error}); {AGAIN}") from None
    for key, wanted in different.items():
        raise UserError(f"{path}: found shards of {key} {meta.get(key)!r}; wanted {wanted!r}; {AGAIN}")
    now = {str(Path(name)): os.path.getsize(name) for pattern in patterns for name in glob(pattern, recursive=True)
           if os.path.isfile(name)}
    if not sources or (now and now != sources):
        raise UserError(f"{path}: found shards of other or changed files for {split}, {', '.join(patterns)}; {AGAIN}")
    return Shards(config.shards_dir, split, meta)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gptchat.shards", description="Encode a config's data into shards.")
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    config = load(arguments.config, arguments.overrides)
    for split, counts in write(config)["splits"].items():
        print(f"{config.shards_dir}: {split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
              f"{counts['bytes']:,} bytes of text")


if __name__ == "__main__":
    cli(main)

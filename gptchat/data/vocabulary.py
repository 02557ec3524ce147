"""Who trained the vocabulary in a tokenizer's folder, and whether it is to be trained anew.

`gptchat tokenizer` writes a record, `trained.json`, beside `tokenizer.json`: the config and the
settings that it was trained by, size, time and digest of each text file, and the digest of
`tokenizer.json` itself. The record is written first, with the one that it replaces inside: whenever
the process is killed, the vocabulary that is there has its record.

Invariants: a vocabulary is trained over only by the config that it was trained by. One without a
record, or that is not what the record says, came from elsewhere and stays; so does one that a run
has begun to train with, since that run could not go on with another.
"""

import dataclasses
import json
import os
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from gptchat.config import Config, TokenizerConfig
from gptchat.data import digests
from gptchat.files import atomic_write, matching_files, split_repeats

RECORD = "trained.json"
FILES = ("tokenizer.json", "merges.txt")  # a folder with one of these holds a vocabulary


class Standing(NamedTuple):
    """What a config may do with the vocabulary that it names."""

    is_own: bool  # there is none, or this config has trained it
    needs_training: bool
    note: str  # why it is kept although it is not what the config says, in a line; "" if it is


def find(folder: str) -> Path | None:
    """The file of the vocabulary in a folder, if there is one; "" is no folder."""
    if not folder:
        return None
    paths = [Path(folder, name) for name in FILES]
    return next((path for path in paths if path.is_file()), None)


def standing(config: Config, config_file: str) -> Standing:
    """What `config`, read from `config_file`, may do with the vocabulary in its `[tokenizer] dir`.

    A text file is read only where its time differs from the record's.
    """
    settings = config.tokenizer
    if find(settings.dir) is None:
        return Standing(is_own=True, needs_training=True, note="")
    record = read_record(settings.dir)
    if record is None:
        return Standing(False, False, f"{settings.dir}: kept as it is; it was not trained here")
    change = _describe_change(record, settings)
    if not is_by(record, config_file):
        note = f"{settings.dir}: kept as it is; {record['config']} trained it"
        return Standing(False, False, f"{note}, and {change}" if change else "")
    has_begun = Path(config.run, "checkpoint.safetensors").is_file()
    if change and has_begun:
        note = f"{settings.dir}: kept, although {change}: {config.run} was trained with it"
        return Standing(True, False, note)
    return Standing(True, bool(change), "")


def is_by(record: dict[str, Any], config_file: str) -> bool:
    """Whether a record names this config file, however the path is spelled."""
    return os.path.abspath(record["config"]) == os.path.abspath(config_file)


def source_states(settings: TokenizerConfig) -> dict[str, digests.FileState]:
    """The states of the text files, to be taken before the vocabulary is trained on them."""
    return {str(path): digests.source_state(path) for path in _text_files(settings)}


def write_record(
    settings: TokenizerConfig,
    config_file: str,
    sources: dict[str, digests.FileState],
    content: bytes,
) -> None:
    """Note how a vocabulary was trained, before its tokenizer.json, `content`, is written."""
    replaced = read_record(settings.dir)
    if replaced:
        replaced.pop("replaced", None)
    record = {
        "config": config_file,
        "settings": _settings_of(settings),
        "sources": sources,
        "digest": digests.new_digest(content).hexdigest(),
        "replaced": replaced,
    }
    with atomic_write(Path(settings.dir, RECORD)) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")


def read_record(folder: str) -> dict[str, Any] | None:
    """The record of the vocabulary in a folder; None if there is none that belongs to it."""
    try:
        digest = digests.file_digest(Path(folder, "tokenizer.json"))
        newest = json.loads(Path(folder, RECORD).read_text())
        for record in (newest, newest.get("replaced")):
            is_complete = record and {"config", "settings", "sources"} <= record.keys()
            if is_complete and record["digest"] == digest:
                return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _describe_change(record: dict[str, Any], settings: TokenizerConfig) -> str:
    """How settings or text differ from the record's, "" if they do not.

    Text files that are all gone count as unchanged.
    """
    now = _settings_of(settings)
    for key in sorted(now.keys() | record["settings"].keys()):
        was, is_now = record["settings"].get(key), now.get(key)
        if was != is_now:
            return f"{key} was {was!r} and is {is_now!r}"
    sources = record["sources"]
    names = [str(path) for path in _text_files(settings)]
    for name in names:
        if name not in sources:
            return f"{name} is new"
        if not digests.is_unchanged(name, sources[name]):
            return f"{name} has changed"
    gone = sorted(sources.keys() - set(names))
    return f"{gone[0]} is gone" if names and gone else ""


def _settings_of(settings: TokenizerConfig) -> dict[str, Any]:
    """The settings but the folder, as JSON gives them back."""
    values = dataclasses.asdict(settings)
    del values["dir"]
    return json.loads(json.dumps(values))


def _text_files(settings: TokenizerConfig) -> list[Path]:
    matched = chain.from_iterable(matching_files(pattern) for pattern in settings.files)
    return split_repeats(matched)[0]

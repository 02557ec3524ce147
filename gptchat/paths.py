"""What configs name, as variables for make: `gptchat paths [--data] [--lm FILE] [--chatlm FILE]`.

The Makefile evaluates each word that is printed. PREFIX is LM or CHATLM:

    PREFIX_RUN:=FOLDER              the run's folder
    PREFIX_HAS_TEST:=yes            there is a test split
    CHATLM_PICK:=mmi                which of five answers is given: mmi where the model has learned
                                    the turns of both speakers, else median
    PREFIX_DATA+=FILE               --data: a file of [data]
    PREFIX_START:=FILE              --data: what must be there before the run begins: its vocabulary
                                    or, for a ChatLM that starts from this LM, the LM's test.txt
    PREFIX_VOCABULARY:=FILE         --data: the vocabulary to train for this run
    PREFIX_VOCABULARY_TEXT+=FILE    --data: a file that it is trained on
    PREFIX_VOCABULARY_IS_OLD:=yes   --data: it is there, and is to be trained anew (vocabulary.py)
    CORPORA+=FILE                   --data: a file that `gptchat corpora` writes
    PATHS_READ:=yes                 all went well

Nothing here imports torch, since make waits for it at every call.

Raises UserError for what would stop the run later: a config or a file that is missing, no valid
data, folders that make cannot handle. A data file whose name make cannot handle is left out, with a
line that says so: make then does not notice when that file changes.
"""

import argparse
import fnmatch
import os
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from gptchat.config import Config, load_config, load_run_config
from gptchat.console import CommandParser, UserError
from gptchat.data import vocabulary
from gptchat.data.splits import SPLITS, patterns_of
from gptchat.files import expand

CORPORA = (  # what `gptchat corpora` writes
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
NAME_FOR_MAKE = re.compile(r"[\w./+@,-]+")


def words(configs: dict[str, tuple[str, Config]], with_data: bool) -> Iterator[str]:
    """The words for make; `configs` is prefix -> (file, config)."""
    runs = [_folder(config.run, f"{file}: run") for file, config in configs.values()]
    if len(set(map(os.path.normpath, runs))) < len(runs):
        files = " and ".join(file for file, _ in configs.values())
        raise UserError(f"{files}: both have the run folder {runs[0]}; wanted one each")
    vocabularies: set[str] = set()
    left_out: dict[str, None] = {}  # files that make cannot handle; data and vocabulary share some
    for (prefix, (file, config)), run in zip(configs.items(), runs, strict=True):
        yield f"{prefix}_RUN:={run}"
        if patterns_of(config.data, "test"):
            yield f"{prefix}_HAS_TEST:=yes"
        if prefix == "CHATLM":
            yield f"{prefix}_PICK:={'mmi' if config.data.learns_both_speakers else 'median'}"
        if not with_data:
            continue
        patterns = chain.from_iterable(patterns_of(config.data, split) for split in SPLITS)
        named = _named_files(dict.fromkeys(patterns), f"[data] of {file}")
        _check_apart(run, named, file)
        yield from (f"{prefix}_DATA+={name}" for name in _for_make(named, left_out))
        if not config.init_from:
            yield from _vocabulary_words(prefix, file, config, vocabularies, left_out)
        elif prefix == "CHATLM" and "LM" in configs and _starts_from(config, configs["LM"][1]):
            yield f"{prefix}_START:={configs['LM'][1].run}/test.txt"
    if with_data:
        yield from (f"CORPORA+={name}" for name in CORPORA)
    _warn_of(list(left_out))
    yield "PATHS_READ:=yes"


def _check_apart(run: str, names: Sequence[str], file: str) -> None:
    """Raise UserError where a run would write a file that it reads."""
    written = os.path.normpath(f"{run}/test.txt")
    if written in map(os.path.normpath, names):
        raise UserError(
            f"{file}: run: found {run!r}, where make would write {written}, a file of [data]; "
            "wanted a folder of its own"
        )


def _vocabulary_words(
    prefix: str,
    file: str,
    config: Config,
    vocabularies: set[str],
    left_out: dict[str, None],
) -> Iterator[str]:
    """The words about the vocabulary that a run without `init_from` takes.

    `vocabularies` are those that other configs have been given a rule for.
    """
    settings = config.tokenizer
    folder = _folder(settings.dir, f"{file}: [tokenizer] dir")
    path = str(vocabulary.find(folder) or Path(folder, "tokenizer.json"))
    yield f"{prefix}_START:={path}"
    if path in vocabularies:
        return
    vocabularies.add(path)
    yield f"{prefix}_VOCABULARY:={path}"
    standing = vocabulary.standing(config, file)
    if standing.note:
        print(standing.note, file=sys.stderr)
    if standing.needs_training:
        texts = _named_files(settings.files, f"[tokenizer] of {file}")
        yield from (f"{prefix}_VOCABULARY_TEXT+={name}" for name in _for_make(texts, left_out))
        if os.path.exists(path):
            yield f"{prefix}_VOCABULARY_IS_OLD:=yes"


def _starts_from(config: Config, lm: Config) -> bool:
    return os.path.normpath(config.init_from) == os.path.normpath(f"{lm.run}/model")


def _named_files(patterns: Sequence[str] | dict[str, None], named_by: str) -> list[str]:
    """The files that patterns match, those of the default corpora also if they are yet to be made.

    Raises UserError for a pattern that matches nothing.
    """
    names: list[str] = []
    for pattern in patterns:
        default = fnmatch.filter(CORPORA, os.path.normpath(pattern))
        absent = [name for name in default if not os.path.exists(name)]
        if not default or len(absent) < len(default):
            names += map(str, expand([pattern], named_by))
        names += absent
    return list(dict.fromkeys(names))


def _for_make(names: Sequence[str], left_out: dict[str, None]) -> Iterator[str]:
    """The names that make can handle; the others become keys of `left_out`."""
    for name in names:
        if NAME_FOR_MAKE.fullmatch(name):
            yield name
        else:
            left_out[name] = None


def _warn_of(left_out: Sequence[str]) -> None:
    """A line on stderr tells of the first file that make cannot handle, and how many there are."""
    if left_out:
        print(
            f"warning: {left_out[0]!r}: make cannot handle a name with other characters than "
            "letters, digits and ./_+@,- and so does not notice when this file changes"
            + (f" ({len(left_out)} files are named so)" if len(left_out) > 1 else ""),
            file=sys.stderr,
        )


def _folder(name: str, key: str) -> str:
    """A folder's name, as make has to handle it."""
    if not NAME_FOR_MAKE.fullmatch(name):
        raise UserError(
            f"{key}: found {name!r}; wanted a folder for make, with only letters, digits and "
            "./_+@,- in its name (the commands themselves take any)"
        )
    return name


def read_configs(args: argparse.Namespace) -> dict[str, tuple[str, Config]]:
    """Prefix -> (file, config) of the configs that are named."""
    files = {"LM": args.lm, "CHATLM": args.chatlm}
    load = load_run_config if args.data else load_config
    return {prefix: (file, load(file)) for prefix, file in files.items() if file}


def check_prompts(file: str) -> None:
    """Raise UserError where a file of prompts could not be answered, after all training."""
    from gptchat.data.dialogue_files import read_prompts  # only here: it takes time to load

    for _ in read_prompts(file):
        pass


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "paths",
        "Print the files and folders that configs name, as variables for the Makefile.",
        "gptchat paths --data --lm configs/lm.toml --chatlm configs/chatlm.toml",
    )
    parser.add_argument("--lm", metavar="FILE", help="config of an LM")
    parser.add_argument("--chatlm", metavar="FILE", help="config of a ChatLM")
    parser.add_argument("--data", action="store_true", help="data and vocabulary, too")
    parser.add_argument("--prompts", metavar="FILE", help="check that these can be answered")
    args = parser.parse_args(argv)
    if not (args.lm or args.chatlm):
        raise UserError("wanted --lm FILE, --chatlm FILE or both")
    if args.prompts:
        check_prompts(args.prompts)
    print("\n".join(words(read_configs(args), args.data)))

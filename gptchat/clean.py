"""Remove what was made, and nothing else: `gptchat clean [--config FILE ...] [--corpora]`.

Of each config these are the run's files, the shards, and the vocabulary if this config trained it
(`vocabulary.py`); besides, the archives in out/serve. `--corpora` removes those files below data/
that hold what `gptchat corpora` writes.

Invariants: a file goes only if it has a name that gptchat gives, in a folder that is what the
config says: a run with a run's config.json, shards with their meta.json. Folders go when they are
empty. What stays in them is named. Nothing is removed while a process works in the folder.
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from gptchat.config import Config, load_config
from gptchat.console import CommandParser, UserError
from gptchat.data import corpora, vocabulary
from gptchat.files import lock_folder

RUN_FILES = (
    "checkpoint.safetensors",
    "config.json",
    "log.jsonl",
    "speed.jsonl",
    "test.txt",
    "prompts.tsv",
    "answers.tsv",
    "chat_history",
    "tensorboard/events.out.tfevents.*",
    "model/config.json",
    "model/generation_config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "model/README.md",
    "model/.*.tmp",
    ".*.tmp",
    ".lock",
)
SHARD_FILES = ("meta.json", "train-*.bin", "valid-*.bin", "test-*.bin", "*.tmp", ".*.tmp", ".lock")
PART_FILES = tuple(f"part-*-of-*/{name}" for name in SHARD_FILES)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", vocabulary.RECORD, ".lock")
SERVE_FILES = ("config.properties", "key_file.json", "draining")
SERVE_FOLDERS = ("store", "staging", "tmp", "logs")  # their whole content is TorchServe's


def clean_config(config: Config, config_file: str) -> None:
    """Remove what was made from one config."""
    run = Path(config.run)
    if _holds(run / "config.json", {"task", "run", "train", "text"}):
        remove(run, RUN_FILES)
    shards = config.shards_dir
    metas = [shards / "meta.json", *shards.glob("part-*-of-*/meta.json")]
    if any(_holds(meta, {"format", "splits"}) for meta in metas):
        remove(shards, SHARD_FILES + PART_FILES)
    folder = config.tokenizer.dir
    record = vocabulary.read_record(folder)
    if record and not config.init_from and vocabulary.is_by(record, config_file):
        remove(Path(folder), TOKENIZER_FILES)


def _holds(path: Path, keys: set[str]) -> bool:
    """Whether a file is a JSON object with these keys."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and keys <= values.keys()


def remove(folder: Path, patterns: Iterable[str]) -> None:
    """Remove the files that the patterns name in a folder, then folders that are empty.

    Raises UserError while another process works in the folder.
    """
    lock = lock_folder(folder, "another process works here")
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.is_file() and not path.is_symlink():
                path.unlink()
    lock.close()
    report(folder)


def report(folder: Path) -> None:
    """Remove what is empty in a folder and above it; say what became of the folder."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            remove_if_empty(path)
    for path in (folder, *folder.parents[:-1]):  # the last is the working directory, or /
        if not remove_if_empty(path):
            break
    if folder.exists():
        kept = sorted(path.name for path in folder.iterdir())
        names = ", ".join(kept[:3]) + (" ..." if len(kept) > 3 else "")
        print(f"{folder}: kept {names}, which gptchat did not write")
    else:
        print(f"{folder}: removed")


def remove_if_empty(folder: Path) -> bool:
    """Whether the folder is gone."""
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


def clean_serve(folder: Path) -> None:
    """Remove the archives and run-time files of `gptchat serve`."""
    if not (folder / "store").is_dir():
        return
    for name in SERVE_FOLDERS:
        for path in (folder / name).rglob("*"):
            if not path.is_dir() or path.is_symlink():
                path.unlink()
    for name in SERVE_FILES:
        (folder / name).unlink(missing_ok=True)
    report(folder)


def clean_corpora(data: Path) -> None:
    """Remove the files of the default corpora that nobody has changed; name the others."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):  # which lists what is written
            corpora.build(Path(folder))
        written = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        for path in written:
            own = data / path.relative_to(folder)
            if not own.is_file():
                continue
            if own.read_bytes() == path.read_bytes():
                own.unlink()
                print(f"{own}: removed")
            else:
                print(f"{own}: kept; it is not what `gptchat corpora` writes")
            for parent in (own.parent, *own.parent.parents[:-1]):
                if not remove_if_empty(parent):
                    break


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "clean",
        "Remove what was made from configs: runs, shards, vocabularies trained here, archives.\n"
        "Files that gptchat did not write stay.",
        "gptchat clean --config configs/lm.toml --config configs/chatlm.toml",
    )
    add = parser.add_argument
    add("--config", action="append", default=[], metavar="FILE", help="may be repeated")
    add("--corpora", action="store_true", help="the default corpora in data/")
    args = parser.parse_args(argv)
    if not (args.config or args.corpora):
        raise UserError("wanted --config FILE or --corpora")
    for file in args.config:
        clean_config(load_config(file), file)
    if args.config:
        clean_serve(Path("out/serve"))
    if args.corpora:
        clean_corpora(Path("data"))

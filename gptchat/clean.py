"""Remove what was made, and nothing else: `gptchat clean [--config FILE ...] [--corpora]`.

Of each config these are the run's files, the shards, and the vocabulary if this config trained it
(`vocabulary.py`); besides, the archives in out/serve. `--corpora` removes those files below data/
that hold what `gptchat corpora` writes.

Invariants: a file goes only if it has a name that gptchat gives, in a folder that is what the
config says: a run with a run's config.json, shards with their meta.json, an archive with a manifest
that names our handler. It stays if it is reached through a link below that folder, or if [data] or
[tokenizer] of a config names it. Folders go when they are empty. What stays in them is named.
Nothing is removed from a folder while a process works in it.
"""

import contextlib
import glob
import io
import json
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from gptchat.config import Config, load_config
from gptchat.console import CommandParser, UserError
from gptchat.data import corpora, vocabulary
from gptchat.data.parts import parts_in
from gptchat.files import PACKAGE, lock_folder, matching_files, shipped

MODEL_FILES = (
    "model/config.json",
    "model/generation_config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "model/README.md",
)
TEMPORARY = ".*.[0-9]*.tmp"  # what a killed `atomic_write` leaves
RUN_FILES = (
    "checkpoint.safetensors",
    "test.txt",
    "prompts.tsv",  # of older runs
    "answers.tsv",
    "chat_history",
    "tensorboard/events.out.tfevents.*",
    *MODEL_FILES,
    f"model/{TEMPORARY}",
    TEMPORARY,
    "config.json",  # late, so that a clean that was stopped can be repeated
    ".lock",
)
SPLIT_FILES = ("train-*.bin", "valid-*.bin", "test-*.bin")
SHARD_FILES = ("meta.json", *SPLIT_FILES, "*.bin.tmp", TEMPORARY, ".lock")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", vocabulary.RECORD, TEMPORARY, ".lock")
SERVE_FILES = ("config.properties", "key_file.json", "draining", ".lock")
MANIFEST = "MAR-INF/MANIFEST.json"
ARCHIVE_FILES = (  # of an archive that is a folder, besides the code
    "gptchat_handler.py",
    "model-config.yaml",
    *MODEL_FILES,
    "**/__pycache__/*.pyc",
    MANIFEST,
)


def clean(configs: Mapping[str, Config], serve: Path) -> None:
    """Remove what was made from configs, file -> config, and the archives; name what stays."""
    texts = [(*config.tokenizer.files, *config.data.train) for config in configs.values()]
    texts += [(*config.data.valid, *config.data.test) for config in configs.values()]
    own = chain.from_iterable(map(matching_files, chain.from_iterable(texts)))
    spared = {path.resolve() for path in own}
    folders: list[Path] = []
    try:
        for file, config in configs.items():
            folders.extend(clean_config(config, file, spared))
        folders.extend(clean_serve(serve, spared))
    finally:
        report(folders)


def clean_config(config: Config, config_file: str, spared: set[Path]) -> Iterator[Path]:
    """Remove what was made from one config; yields the folders."""
    run = Path(config.run)
    if _holds(run / "config.json", {"task", "run", "train", "text"}):
        remove(run, RUN_FILES, spared)
        yield run
    shards = config.shards_dir
    parts = [shards / part.folder for part in parts_in(shards)]
    parts = [path for path in parts if path.is_dir() and not path.is_symlink()]
    folders = [*parts, shards]
    if any(_holds(folder / "meta.json", {"format", "splits"}) for folder in folders):
        for folder in folders:
            remove(folder, SHARD_FILES, spared)
        yield shards
    tokenizer = config.tokenizer.dir
    record = vocabulary.find(tokenizer) and vocabulary.read_record(tokenizer)
    if record and not config.init_from and vocabulary.is_by(record, config_file):
        remove(Path(tokenizer), TOKENIZER_FILES, spared)
        yield Path(tokenizer)


def clean_serve(folder: Path, spared: set[Path]) -> Iterator[Path]:
    """Remove the archives and run-time files of `gptchat serve`; yields the folder."""
    if not (folder / "store").is_dir():
        return
    patterns: list[str] = []
    for archive in (folder / "store").iterdir():
        name = f"store/{glob.escape(archive.name)}"
        if not _is_archive(archive):
            continue
        if archive.is_dir():
            patterns += [f"{name}/{file}" for file in (*_packed_code(), *ARCHIVE_FILES)]
        else:
            patterns.append(name)
    remove(folder, (*patterns, *SERVE_FILES), spared)
    yield folder


def _is_archive(path: Path) -> bool:
    """Whether the launcher made this archive: its manifest names our handler."""
    try:
        if path.is_dir():
            manifest = (path / MANIFEST).read_bytes()
        else:
            with zipfile.ZipFile(path) as archive:
                manifest = archive.read(MANIFEST)
        return json.loads(manifest)["model"]["handler"] == "gptchat_handler.py"
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return False


def _packed_code() -> Iterator[str]:
    """The names of the files of this package and the handlers, as an archive has them."""
    for name, source in (("gptchat", PACKAGE), ("handlers", shipped("handlers"))):
        for path in source.rglob("*"):
            yield f"{name}/{glob.escape(str(path.relative_to(source)))}"


def _holds(path: Path, keys: set[str]) -> bool:
    """Whether a file is a JSON object with these keys."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and keys <= values.keys()


def remove(folder: Path, patterns: Iterable[str], spared: set[Path]) -> None:
    """Remove the files that the patterns name in a folder, but those that are spared.

    Raises UserError while another process works in the folder.
    """
    real = folder.resolve()
    with lock_folder(folder, "another process works here"):
        for pattern in patterns:
            for path in list(folder.glob(pattern)):
                target = path.resolve()
                is_without_link = target == real / path.relative_to(folder)
                if is_without_link and target.is_file() and target not in spared:
                    path.unlink()


def report(folders: Sequence[Path]) -> None:
    """Remove what is empty in folders and above them; say what became of each."""
    for folder in folders:
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                remove_if_empty(path)
        for path in (folder, *folder.parents[:-1]):  # the last is the working directory, or /
            if not remove_if_empty(path):
                break
    for folder in folders:
        paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
        kept = sorted(str(path.relative_to(folder)) for path in paths)
        names = ", ".join(kept[:3]) + (" ..." if len(kept) > 3 else "")
        if kept:
            print(f"{folder}: kept {names} (not made from these configs, or named as their data)")
        else:
            print(f"{folder}: removed")


def remove_if_empty(folder: Path) -> bool:
    """Whether the folder is gone."""
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


def clean_corpora(data: Path) -> None:
    """Remove the files of the default corpora that nobody has changed; name the others."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):  # which lists what is written
            corpora.write_corpora(Path(folder))
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
    configs = {file: load_config(file) for file in args.config}
    try:
        if configs:
            clean(configs, Path("out/serve"))
        if args.corpora:
            clean_corpora(Path("data"))
    except OSError as error:
        reason = f"{error.filename}: cannot be removed: {error.strerror}"
        raise UserError(f"{reason}; wanted a folder that can be written") from None

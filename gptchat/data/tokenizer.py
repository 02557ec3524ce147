"""Train, load and save byte-level BPE tokenizers (Radford et al. 2019): `gptchat tokenizer`.

A directory holds `tokenizer.json` and `tokenizer_config.json`, as for transformers' AutoTokenizer,
or GPT-2's pair `vocab.json` and `merges.txt`. A byte-level vocabulary made elsewhere loads as it
is; special tokens that it lacks can be appended.

- Decoding returns every text, to the last byte. Loading checks that on one text, PROBE.
- Text never becomes a special token: "[SEP]" typed by a user is encoded as letters. The library
  does not save its setting for that, `encode_special_tokens`, so it is set at every load. In
  transformers such text does become the special token.
- A vocabulary is trained again only if its settings or text have changed, and if the run that it
  was trained for has not begun.
"""

import hashlib
import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptchat.artifacts import (
    changed_input,
    changed_setting,
    file_digest,
    input_states,
    lock_folder,
    new_digest,
    read_manifest,
    write_manifest,
)
from gptchat.config import Config, TokenizerConfig, load_config
from gptchat.console import CommandParser, Progress, UserError, first_line
from gptchat.data.corpora import write_missing
from gptchat.data.dialogue_files import texts_of
from gptchat.data.reading import text_size
from gptchat.data.scripts import pattern_of, pre_tokenizer
from gptchat.files import atomic_write, expand, matching_files

SPECIAL = ("[PAD]", "[UNK]", "[BOS]", "[EOS]", "[CLS]", "[SEP]")  # ids 0 to 5 if trained here
END_OF_TEXT = "<|endoftext|>"  # serves as [EOS] in GPT-2's vocabulary
SAMPLE_BYTES = 100_000_000  # of text that a vocabulary is trained on, at most
# Characters of 1 to 4 bytes, control characters, white space, text like special tokens.
PROBE = "Caf\u00e9's  42\r\n\t\u65e5\u672c \U0001f600e\u0301\x00\ufb01[SEP]<|endoftext|>\u2028 x "


def _byte_alphabet() -> dict[str, int]:
    """Characters of a byte-level vocabulary -> bytes (`bytes_to_unicode` of GPT-2's encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + n): byte for n, byte in enumerate(others)}
    return alphabet


BYTE_OF = _byte_alphabet()


class SortedTokens(NamedTuple):
    """All tokens of a vocabulary, sorted by their bytes."""

    pieces: list[bytes]
    ids: list[int]  # in the same order
    joined: bytes  # the pieces, divided by the byte 0xff, which UTF-8 never has
    ends: list[int]  # of each piece in `joined`, its divider included


class Tokenizer:
    """A byte-level tokenizer and the ids of its special tokens, -1 for one that it lacks.

    `token_bytes[id]` holds the bytes of a token, none for special tokens. `end_token` serves as
    [EOS]; without it that is [EOS], else `<|endoftext|>`. `source` names the tokenizer in messages.
    Raises UserError for one that does not give every text back.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        source: str = "tokenizer",
        end_token: str | None = None,
    ):
        self.backend = backend
        self.end_token = end_token
        self.source = source
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self._read_vocabulary()
        has_all_bytes = BYTE_OF.keys() <= backend.get_vocab().keys()
        if not has_all_bytes or self.decode(self.encode(PROBE)) != PROBE:
            raise UserError(
                f"{source}: does not give every text back; wanted byte-level BPE, as GPT-2's"
            )

    def _read_vocabulary(self) -> None:
        special: dict[str, int] = {}
        for id, token in self.backend.get_added_tokens_decoder().items():
            if token.special:
                special[token.content] = id
        vocabulary = self.backend.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.token_bytes = [b""] * self.vocab_size
        for entry, id in vocabulary.items():
            if entry not in special:
                self.token_bytes[id] = _entry_bytes(entry)
        self.special_ids = {name: special.get(name, -1) for name in SPECIAL}
        for name in (self.end_token, "[EOS]", END_OF_TEXT):
            if name in special:
                self.special_ids["[EOS]"] = special[name]
                break
        self.pad_id = self.special_ids["[PAD]"]
        self.bos_id = self.special_ids["[BOS]"]
        self.eos_id = self.special_ids["[EOS]"]
        self.cls_id = self.special_ids["[CLS]"]
        self.sep_id = self.special_ids["[SEP]"]

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read a directory. Raises UserError if it has no tokenizer, or one that is no use here."""
        path = vocabulary_file(directory)
        if path is None:
            raise UserError(
                f"{directory}: found neither tokenizer.json nor merges.txt; "
                "`gptchat tokenizer` trains one"
            )
        try:
            if path.name == "tokenizer.json":
                backend = tokenizers.Tokenizer.from_file(str(path))
            else:
                backend = _read_gpt2_files(path.parent)
            end_token = _find_end_token(path.parent, backend)
        except Exception as error:  # the library raises nothing narrower
            reason = first_line(error)
            raise UserError(f"{directory}: cannot be read as a tokenizer: {reason}") from None
        if end_token is not None:
            backend.add_special_tokens([end_token])  # marks one that is an ordinary entry
        return cls(backend, str(directory), end_token)

    @property
    def pattern(self) -> str:
        """How it splits text: "gpt2", "script" (scripts.py), or "" for otherwise."""
        return pattern_of(json.loads(self.backend.to_str()))

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical `tokenizer.json`: equal hashes mean equal ids for every text."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    @property
    def json(self) -> str:
        return self.backend.to_str(pretty=True)

    @cached_property
    def pieces(self) -> SortedTokens:
        ids = sorted(range(self.vocab_size), key=self.token_bytes.__getitem__)
        pieces = [self.token_bytes[id] for id in ids]
        ends = list(accumulate(len(piece) + 1 for piece in pieces))
        return SortedTokens(pieces, ids, b"\xff".join(pieces), ends)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, on all cores unless TOKENIZERS_PARALLELISM is "false"."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens are skipped, bytes that are not UTF-8 become U+FFFD."""
        return b"".join([self.token_bytes[id] for id in ids]).decode(errors="replace")

    def missing_specials(self) -> list[str]:
        return [name for name, id in self.special_ids.items() if id < 0]

    def require_specials(self) -> None:
        missing = self.missing_specials()
        if missing:
            raise UserError(
                f"{self.source}: found no {', '.join(missing)}; wanted a tokenizer trained here "
                "or adapted by gptchat convert"
            )

    def add_missing_specials(self) -> list[str]:
        """Append the special tokens that the vocabulary lacks; returns their names."""
        names = self.missing_specials()
        self.backend.add_special_tokens(names)
        self._read_vocabulary()
        return names

    def save(
        self,
        directory: str | Path,
        model_max_length: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Write the two files that transformers' AutoTokenizer loads, `tokenizer.json` last.

        Raises UserError if they cannot be written; the old ones are kept.
        """
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        if model_max_length:
            settings["model_max_length"] = model_max_length
        if chat_template:
            settings["chat_template"] = chat_template
        for name, id in self.special_ids.items():
            if id >= 0:
                key = name.strip("[]").lower() + "_token"  # "[PAD]" -> "pad_token"
                settings[key] = self.backend.id_to_token(id)
        with atomic_write(Path(directory) / "tokenizer.json") as vocabulary:
            # Not `backend.save`, whose error for a full disk is no OSError.
            vocabulary.write_text(self.json, encoding="utf-8")
            with atomic_write(Path(directory) / "tokenizer_config.json") as settings_file:
                settings_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def vocabulary_file(directory: str | Path) -> Path | None:
    """The file that a directory's tokenizer is read from, if there is one."""
    for name in ("tokenizer.json", "merges.txt"):
        path = Path(directory, name)
        if path.is_file():
            return path
    return None


def _entry_bytes(entry: str) -> bytes:
    """The bytes of a vocabulary entry; an added token may be its own text."""
    if all(character in BYTE_OF for character in entry):
        return bytes(BYTE_OF[character] for character in entry)
    return entry.encode()


def _byte_level(model: models.Model, pattern: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer(pattern)
    backend.decoder = decoders.ByteLevel()
    return backend


def _read_gpt2_files(directory: Path) -> tokenizers.Tokenizer:
    """GPT-2's `vocab.json` and `merges.txt`, and the tokens that were added to them.

    Raises ValueError for an added token that cannot have its id.
    """
    bpe = models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    backend = _byte_level(bpe, "gpt2")
    if backend.token_to_id(END_OF_TEXT) is not None:
        backend.add_special_tokens([END_OF_TEXT])  # an ordinary entry in these files
    special = set(_named_tokens(directory).values())
    added = {id: name for name, id in _json_table(directory / "added_tokens.json").items()}
    settings = _json_table(directory / "tokenizer_config.json")
    for id, entry in settings.get("added_tokens_decoder", {}).items():
        added[int(id)] = entry["content"]
        if entry.get("special"):
            special.add(entry["content"])
    for id, name in sorted(added.items()):
        backend.add_tokens([tokenizers.AddedToken(name, special=name in special)])
        if backend.token_to_id(name) != id:
            raise ValueError(
                f"the added token {name!r} has the id {id}; wanted {backend.token_to_id(name)}"
            )
    return backend


def _find_end_token(directory: Path, backend: tokenizers.Tokenizer) -> str | None:
    """The token that ends a text in somebody else's directory, None if it names none.

    It is the tokenizer's `eos_token`, or the `eos_token_id` of config.json; one that is not
    `<|endoftext|>`, the default of both, comes first. An id counts only if text cannot have it:
    many configs keep the id of GPT-2's vocabulary beside another vocabulary.
    """
    ids = _json_table(directory / "config.json").get("eos_token_id")
    id = ids[0] if isinstance(ids, list) and ids else ids
    by_id = backend.id_to_token(id) if isinstance(id, int) and 0 <= id < 2**31 else None
    added = backend.get_added_tokens_decoder()
    if by_id is not None and id not in added:
        text = _entry_bytes(by_id).decode(errors="replace")
        if backend.encode(text, add_special_tokens=False).ids == [id]:
            by_id = None
    named = _named_tokens(directory).get("eos_token")
    if named is None or backend.token_to_id(named) is None:
        return by_id
    return by_id if by_id is not None and named == END_OF_TEXT else named


def _named_tokens(directory: Path) -> dict[str, str]:
    """The special tokens that a directory names: {"eos_token": "</s>"}."""
    tokens = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, token in _json_table(directory / file).items():
            content = token.get("content") if isinstance(token, dict) else token
            if key.endswith("_token") and isinstance(content, str):
                tokens[key] = content
    return tokens


def _json_table(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no file."""
    if not path.exists():
        return {}
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path.name}: {error}") from None


def start_directory(config: Config) -> str:
    """The model directory that a run loads at its start; "" means new weights.

    It is `init_from`. If that is gone, a run that has a checkpoint loads its own best model, which
    has the same size and tokenizer; the weights come from the checkpoint.
    """
    own = Path(config.run, "model")
    can_load_own = has_begun(config.run) and Path(own, "model.safetensors").is_file()
    if config.init_from and can_load_own and not Path(config.init_from).is_dir():
        return str(own)
    return config.init_from


def has_begun(run: str) -> bool:
    """Whether this folder holds a run that would be resumed."""
    return Path(run, "checkpoint.safetensors").is_file()


def tokenizer_for(config: Config) -> Tokenizer:
    """The tokenizer of a run, with all special tokens: that of `init_from`, else the config's."""
    tokenizer = Tokenizer.load(start_directory(config) or config.tokenizer.dir)
    tokenizer.add_missing_specials()
    return tokenizer


def train_tokenizer(settings: TokenizerConfig) -> Tokenizer:
    """A tokenizer of `vocab_size` entries, or fewer if the text does not yield them.

    Of more than SAMPLE_BYTES of text it takes a part, spread evenly over all files. Raises
    UserError for files that cannot be read or hold no text.
    """
    paths = expand(settings.files, "[tokenizer] files")

    def texts() -> Iterator[str]:
        return chain.from_iterable(map(texts_of, paths))

    if not any(text.strip() for text in texts()):
        names = ", ".join(settings.files)
        raise UserError(f"{names}: found no text; wanted some for [tokenizer] files")
    n_bytes = sum(map(text_size, paths))
    stride = max(1, -(-n_bytes // SAMPLE_BYTES))  # rounded up

    def sample(bar: Progress) -> Iterator[str]:
        for number, text in enumerate(texts()):
            bar.update(len(text.encode()))
            if number % stride == 0:
                yield text

    backend = _byte_level(models.BPE(), settings.pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with Progress(n_bytes, "tokenizer", "B") as bar:
        backend.train_from_iterator(sample(bar), trainer)
    return Tokenizer(backend)


def prepare_vocabulary(config: Config, asked: bool = False) -> None:
    """Train the vocabulary in `[tokenizer] dir` if it is missing or out of date.

    One that another run trained, that a run has begun with, or that was not trained here is kept.
    If somebody `asked` for it and it is out of date, that is a UserError.
    """
    folder = config.tokenizer.dir
    if config.init_from:
        if asked:
            print(f"{config.init_from}: its vocabulary is used, so none is trained")
        return
    found = vocabulary_file(folder)
    if found is None:
        _train_and_save(config)
        return
    manifest = read_manifest(folder) or {}
    if manifest.get("vocabulary") != file_digest(found):
        if asked:
            print(f"{folder}: kept as it is; it was not trained here")
        return
    owner = manifest["run"]
    change = changed_setting(manifest["settings"], _training_settings(config))
    change = change or changed_input(manifest["inputs"], matching_files(config.tokenizer.files))
    if not change:
        if asked:
            print(f"{folder}: kept as it is; it was trained by these settings on this text")
    elif owner == config.run and not has_begun(owner):
        _train_and_save(config)
    else:
        line = f"{folder}: kept, although {change}: it is the vocabulary of {owner}"
        if asked:
            raise UserError(f"{line}; wanted another [tokenizer] dir")
        print(line)


def _train_and_save(config: Config) -> None:
    """Train a vocabulary, on the default corpora if it needs them, and write it behind its record.

    A process that is killed leaves the old files or no vocabulary.
    """
    folder = Path(config.tokenizer.dir)
    files = config.tokenizer.files
    write_missing(files)
    with lock_folder(folder, "another process is training a vocabulary here"):
        inputs = input_states(matching_files(files))
        with _ended_by_ctrl_c():
            tokenizer = train_tokenizer(config.tokenizer)
        record = {
            "settings": _training_settings(config),
            "inputs": inputs,
            "run": config.run,
            "vocabulary": new_digest(tokenizer.json.encode()).hexdigest(),
        }
        (folder / "tokenizer.json").unlink(missing_ok=True)
        write_manifest(folder, record)
        tokenizer.save(folder)
    print(f"{folder}: {tokenizer.vocab_size:,} entries")


def _training_settings(config: Config) -> dict[str, Any]:
    settings = asdict(config.tokenizer)
    del settings["dir"]
    return settings


@contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Within it Ctrl-C ends the process; Python would act on it only after minutes of training."""
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if is_usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "tokenizer",
        "Train a tokenizer as the [tokenizer] section of a config says, and save it.",
        "gptchat tokenizer --config configs/lm.toml tokenizer.vocab_size=4096",
    )
    arguments = parser.parse_config_and_overrides(argv)
    prepare_vocabulary(load_config(arguments.config, arguments.overrides), asked=True)

"""Train and load a tokenizer; streaming decode; forbidden words.

    gptchat tokenizer --config configs/lm.toml [section.key=value ...]

Two kinds, both on the bytes of UTF-8, so that nothing is unknown and decoding gives the text back: byte-level BPE
(Radford et al. 2019) and Unigram (Kudo 2018), on the `tokenizers` library. A directory holds `tokenizer.json`, and
`tokenizer_config.json` for transformers' AutoTokenizer. A foreign byte-level vocabulary such as GPT-2's loads as it is.
A user's text is text: `encode_special_tokens` is set at every load, so "[SEP]" typed by someone is just letters. (The
library does not save that setting: in transformers such text does become the special token.)
"""

import argparse
import codecs
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptchat.config import Config, TokenizerConfig, load_config
from gptchat.console import Progress, UserError
from gptchat.files import atomic_write, expand

SPECIAL = (
    "[PAD]",
    "[UNK]",
    "[BOS]",
    "[EOS]",
    "[CLS]",
    "[SEP]",
)  # ids 0..5 in a tokenizer trained here
END_OF_TEXT = "<|endoftext|>"  # serves as [EOS] in GPT-2's vocabulary
PIECE = 1 << 16  # bytes of text read at once for training
PROBE = "Caf\u00e9's  42\r\n\t\u65e5\u672c \U0001f600e\u0301\x00\ufb01[SEP]<|endoftext|>\u2028 x "  # must come back
_SAME = [
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
]  # bytes that a vocabulary writes as that character
_OTHER = sorted(
    set(range(256)) - set(_SAME)
)  # the others are written from U+0100 on, as in GPT-2's encoder.py
BYTE_OF = {chr(byte): byte for byte in _SAME} | {
    chr(256 + n): byte for n, byte in enumerate(_OTHER)
}


class Tokenizer:
    """A byte-level tokenizer and the ids of its special tokens, `pad_id` ... `sep_id`; -1 is one that it lacks."""

    def __init__(self, backend: tokenizers.Tokenizer, source: str = "tokenizer"):
        self.backend, self.source = backend, source
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self._read_vocabulary()
        if (
            not BYTE_OF.keys() <= backend.get_vocab().keys()
            or self.decode(self.encode(PROBE)) != PROBE
        ):
            raise UserError(
                f"{source}: does not give every text back; wanted byte-level BPE, as GPT-2's, or Unigram"
            )

    def _read_vocabulary(self) -> None:
        vocabulary = self.backend.get_vocab()
        special = {
            token.content: id
            for id, token in self.backend.get_added_tokens_decoder().items()
            if token.special
        }
        self.vocab_size = max(vocabulary.values()) + 1
        self.token_bytes = [b""] * self.vocab_size  # id -> bytes; none for special tokens
        for piece, id in vocabulary.items():
            self.token_bytes[id] = b"" if piece in special else _piece_bytes(piece)
        self.special_ids = {name: special.get(name, -1) for name in SPECIAL}
        if self.special_ids["[EOS]"] < 0:
            self.special_ids["[EOS]"] = special.get(END_OF_TEXT, -1)
        self.pad_id, self.unk_id, self.bos_id, self.eos_id, self.cls_id, self.sep_id = (
            self.special_ids.values()
        )

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read `tokenizer.json`, or GPT-2's `vocab.json` and `merges.txt`. Raises UserError for any other kind."""
        path, merges = Path(directory) / "tokenizer.json", Path(directory) / "merges.txt"
        if not path.exists() and not merges.exists():
            raise UserError(
                f"{directory}: found neither tokenizer.json nor merges.txt; `make tokenizer` trains one"
            )
        try:
            backend = (
                tokenizers.Tokenizer.from_file(str(path)) if path.exists() else _from_merges(merges)
            )
        except Exception as error:  # the library raises nothing narrower
            raise UserError(
                f"{directory}: cannot be read as a tokenizer: {str(error).splitlines()[0]}"
            ) from None
        return cls(backend, str(directory))

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical `tokenizer.json`: equal hashes mean equal ids for every text."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, on all cores unless TOKENIZERS_PARALLELISM=false."""
        return [
            encoding.ids
            for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens are skipped, bytes that are not UTF-8 become U+FFFD."""
        return b"".join([self.token_bytes[id] for id in ids]).decode(errors="replace")

    def require_specials(self) -> None:
        """Raises UserError if a special token is missing, as in a vocabulary made elsewhere."""
        if missing := [name for name, id in self.special_ids.items() if id < 0]:
            raise UserError(
                f"{self.source}: found no {', '.join(missing)}; wanted a tokenizer trained here or adapted "
                "by gptchat convert"
            )

    def add_missing_specials(self) -> list[str]:
        """Append the special tokens that the vocabulary lacks, in their order; returns their names."""
        names = [name for name, id in self.special_ids.items() if id < 0]
        self.backend.add_special_tokens(names)
        self._read_vocabulary()
        self.__dict__.pop("pieces", None)
        return names

    def save(self, directory: str | Path, model_max_length: int | None = None) -> None:
        """Write the two files that transformers' AutoTokenizer loads; `tokenizer.json`, atomic_write in, comes last."""
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        settings |= {"model_max_length": model_max_length} if model_max_length else {}
        settings |= {
            f"{name[1:4].lower()}_token": self.backend.id_to_token(id)
            for name, id in self.special_ids.items()
            if id >= 0
        }
        with atomic_write(Path(directory) / "tokenizer_config.json") as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        with atomic_write(Path(directory) / "tokenizer.json") as temporary:
            self.backend.save(str(temporary))

    @cached_property
    def pieces(self) -> tuple[list[bytes], list[int], bytes, list[int]]:
        """All tokens' bytes, sorted; their ids; them joined by 0xff, which UTF-8 never has; where each ends there."""
        ids = sorted(range(self.vocab_size), key=self.token_bytes.__getitem__)
        pieces = [self.token_bytes[id] for id in ids]
        return (
            pieces,
            ids,
            b"\xff".join(pieces),
            list(accumulate(len(piece) + 1 for piece in pieces)),
        )


def tokenizer_for(config: Config) -> Tokenizer:
    """The tokenizer of a run: its model's, if it starts from one, or the config's; with every special token."""
    tokenizer = Tokenizer.load(config.init_from or config.tokenizer.dir)
    tokenizer.add_missing_specials()
    return tokenizer


def _piece_bytes(piece: str) -> bytes:
    """A vocabulary entry's bytes; an added token's text, where it is not in that alphabet, stands for itself."""
    return bytes(BYTE_OF[c] for c in piece) if all(c in BYTE_OF for c in piece) else piece.encode()


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _from_merges(merges: Path) -> tokenizers.Tokenizer:
    """GPT-2's two files; its end of text, an ordinary entry there, is marked as special."""
    backend = _byte_level(models.BPE.from_file(str(merges.with_name("vocab.json")), str(merges)))
    backend.add_special_tokens(
        [token for token in (END_OF_TEXT,) if backend.token_to_id(token) is not None]
    )
    return backend


def sample(paths: Sequence[Path], limit: int) -> Iterator[tuple[str, int]]:
    """(text, its bytes): all of the files, or about `limit` bytes in pieces spread evenly over them; flat memory.

    Pieces are whole lines where lines are short. Raises UserError with file and byte where they are not UTF-8.
    """
    total, start = sum(path.stat().st_size for path in paths), 0
    step = (
        -(-total // max(1, limit // PIECE)) if limit < total else 0
    )  # 0: everything, without gaps
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file:
            while start < size:
                file.seek(start)
                data, last = file.read(PIECE), start + PIECE >= size
                begin = data.find(b"\n") + 1 or len(data) - len(
                    data.lstrip(bytes(range(0x80, 0xC0)))
                )
                begin = begin if step and start else 0
                end = len(data) if last else data.rfind(b"\n") + 1 or len(data)
                try:
                    text, used = codecs.utf_8_decode(data[begin:end], "strict", last)
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}: byte {start + begin + error.start}: found invalid UTF-8"
                    ) from None
                yield text, used
                start += step or used
        start -= size


def train(settings: TokenizerConfig) -> Tokenizer:
    """A tokenizer of `vocab_size` entries, or fewer if the text does not yield them.

    BPE comes out the same every time. Unigram does not quite: the library sums in the random order of a hash table.
    """
    paths, limit = expand(settings.files, "[tokenizer] files"), int(settings.sample_mb * 1e6)
    options: dict[str, Any] = {
        "vocab_size": settings.vocab_size,
        "special_tokens": list(SPECIAL),
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
        "show_progress": False,
    }
    bpe = settings.kind == "bpe"
    backend = _byte_level(models.BPE() if bpe else models.Unigram())
    trainer: Any = (
        trainers.BpeTrainer(**options)
        if bpe
        else trainers.UnigramTrainer(unk_token="[UNK]", **options)
    )

    def texts(bar: Progress) -> Iterator[str]:
        for text, used in sample(paths, limit):
            yield text
            bar.update(used)

    with Progress(min(limit, sum(path.stat().st_size for path in paths)), "tokenizer", "B") as bar:
        backend.train_from_iterator(texts(bar), trainer)
    return Tokenizer(backend if bpe else _rounded(backend))


def _rounded(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Unigram's scores to 6 digits: longer ones change when the library reads them back, and `hash` with them."""
    state = json.loads(backend.to_str())
    state["model"]["vocab"] = [[piece, round(score, 6)] for piece, score in state["model"]["vocab"]]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gptchat tokenizer", description="Train a tokenizer.")
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args(argv)
    settings = load_config(arguments.config, arguments.overrides).tokenizer
    tokenizer = train(settings)
    tokenizer.save(settings.dir)
    print(f"{settings.dir}: {settings.kind}, {tokenizer.vocab_size:,} entries")

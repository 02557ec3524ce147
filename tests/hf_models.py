"""Small transformers GPT-2 models with no tensor at its initial value, and directories of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from gptchat.data.tokenizer import SPECIAL, Tokenizer

logging.disable_progress_bar()
logging.set_verbosity_error()

SMALL: dict[str, Any] = dict(
    vocab_size=300,
    n_positions=48,
    n_embd=24,
    n_layer=3,
    n_head=4,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
    bos_token_id=2,
    eos_token_id=3,
    pad_token_id=0,
)


def byte_tokenizer(special: tuple[str, ...] = SPECIAL) -> Tokenizer:
    """A byte-level tokenizer without merges: the special tokens, then the 256 bytes; entries
    0..261.
    """
    vocabulary = {
        piece: id
        for id, piece in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return Tokenizer(backend)


@torch.no_grad()
def shake(model: torch.nn.Module, seed: int) -> None:
    """Move every parameter away from its initial value: biases off zero, gains off one, weights
    large enough that attention is peaked and activations leave their linear part.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_((0.2 * noise).to(parameter.dtype))


def random_gpt2(
    seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any
) -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(**(SMALL | changes))).to(dtype).eval()
    shake(model, seed)
    return model


def write(model: GPT2LMHeadModel, directory: Path, tokenizer: Tokenizer | None = None) -> Path:
    """What transformers writes, and a tokenizer beside it."""
    model.save_pretrained(directory)
    (tokenizer or byte_tokenizer()).save(directory)
    return directory


class BadWords:
    """transformers' `bad_words_ids` as a word filter: no word, given as ids, is ever completed."""

    def __init__(self, words: Sequence[Sequence[int]]):
        self.words = [list(word) for word in words]

    def banned(self, ids: Sequence[int]) -> list[int]:
        begun = [
            word for word in self.words if len(word) == 1 or list(ids[1 - len(word) :]) == word[:-1]
        ]
        return [word[-1] for word in begun]


def close(found: torch.Tensor, wanted: torch.Tensor, relative: float) -> bool:
    """Within `relative` of the tensor's maximum."""
    return bool((found - wanted).abs().max() <= relative * wanted.abs().max())

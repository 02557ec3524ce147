"""The model that one worker serves, with its engine and the server's settings.

The engine gets as many slots as `settings.slots` asks for and `settings.cache_mb` has memory for.
`generator.engine.slots` is their number; the settings never change.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from gptchat.config import ServerSettings
from gptchat.inference.engine import Request, generate
from gptchat.inference.generate import TextGenerator
from gptchat.model import pretrained
from gptchat.model.devices import default_device
from gptchat.model.gpt2 import GPT2Config
from gptchat.runtime import tune_memory


@dataclass(frozen=True)
class ServedModel:
    """A model under the name that clients use for it."""

    name: str
    generator: TextGenerator
    settings: ServerSettings

    @cached_property
    def longest_text(self) -> int:
        """Characters that a full context can hold; longer texts are refused unencoded."""
        longest_token = max(map(len, self.generator.tokenizer.token_bytes))
        return self.generator.n_ctx * longest_token


def slots_that_fit(config: GPT2Config, settings: ServerSettings) -> int:
    """How many sequences the KV cache holds: limited by `slots` and `cache_mb`, at least one."""
    bytes_per_float = 4
    keys_and_values = 2 * config.n_layer * config.n_embd * config.n_positions
    slots_in_memory = settings.cache_mb * 2**20 // (keys_and_values * bytes_per_float)
    return max(1, min(settings.slots, slots_in_memory))


def load_served_model(directory: Path, name: str, settings: ServerSettings) -> ServedModel:
    """Read a model directory and start an engine, which then has run once. Raises UserError.

    This happens in a thread that ends with it. Each thread that computes gets OpenMP threads of its
    own, which live as long as it does, and with more of them than cores, libgomp lets all sleep
    where they would wait for work: the decode thread would take two to three times as long for a
    step of a small model.
    """
    with ThreadPoolExecutor(1, "load") as thread:
        return thread.submit(_load, directory, name, settings).result()


def _load(directory: Path, name: str, settings: ServerSettings) -> ServedModel:
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    model, tokenizer, task = pretrained.load_model(directory, default_device())
    slots = slots_that_fit(model.config, settings)
    generator = TextGenerator(
        model, tokenizer, task, slots, settings.dtype, prefix_cache=settings.prefix_cache
    )
    token_types = [1] if task == "chatlm" else None
    generate(generator.engine, [Request([0], token_types)])
    tune_memory()
    return ServedModel(name, generator, settings)

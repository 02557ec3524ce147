"""The model that one worker serves, with its engine and the server's settings, and its prompts."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from gptchat.config import ServerSettings
from gptchat.console import UserError
from gptchat.data.dialogue import TextTurn
from gptchat.inference.engine import Request, generate
from gptchat.inference.generate import TextGenerator, prompt_room
from gptchat.inference.sampling import Sampling
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2Config
from gptchat.runtime import default_device, tune_memory
from handlers.body import Refusal


@dataclass(frozen=True)
class ServedModel:
    """A model under the name that clients use. Refusal is raised for an impossible prompt."""

    name: str
    generator: TextGenerator
    settings: ServerSettings

    @property
    def chats(self) -> bool:
        return self.generator.task == "chatlm"

    @property
    def n_ctx(self) -> int:
        return self.generator.n_ctx

    @property
    def most_new_tokens(self) -> int:
        return min(self.settings.max_new_tokens, self.n_ctx)

    @property
    def chat_new_tokens(self) -> int:
        """The default length of a message, at most half of the context."""
        return min(self.generator.sampling.max_new_tokens, self.n_ctx // 2)

    @cached_property
    def longest_text(self) -> int:
        """Characters that a full context can hold; longer texts are refused unencoded."""
        return self.n_ctx * max(map(len, self.generator.tokenizer.token_bytes))

    def too_long(self, found: str) -> Refusal:
        """litellm knows this mistake by its first words, langchain by "prompt is too long"."""
        length = f"This model's maximum context length is {self.n_ctx} tokens"
        message = f"{length} and the prompt is too long: {found}"
        return Refusal(message, code="context_length_exceeded")

    def encode(self, text: str) -> list[int]:
        if len(text) > self.longest_text:
            raise self.too_long(f"a text of {len(text)} characters cannot fit")
        return self.generator.tokenizer.encode(text)

    def prompt(self, given: str | list[int]) -> list[int]:
        """The ids of a text to be continued; an empty one starts from [EOS]."""
        ids = self.encode(given) if isinstance(given, str) else given
        eos_id = self.generator.tokenizer.eos_id
        if not ids and not 0 <= eos_id < self.generator.n_vocab:
            raise Refusal("a prompt is empty, and the model has no [EOS] to start from")
        if len(ids) > self.n_ctx:
            raise self.too_long(f"it has {len(ids)} tokens")
        return ids or [eos_id]

    def continuation(self, ids: list[int], sampling: Sampling, n: int, score: bool) -> Request:
        """A ChatLM continues the prompt as the responder's words."""
        types = [1] * len(ids) if self.chats else None
        return Request(ids, types, sampling, n, self.generator.stop_ids, score)

    def reply(
        self, turns: Sequence[TextTurn], beginning: list[int], sampling: Sampling, n: int
    ) -> Request:
        """The dialogue's next turn, which starts with `beginning`.

        The oldest turns are dropped until the answer has room; what cannot fit is not encoded.
        """
        if not beginning and not any(text for _, text in turns):
            raise Refusal("the conversation has no text; wanted some to answer")
        room = prompt_room(self.n_ctx, sampling.max_new_tokens)
        encoded: list[tuple[int, list[int]]] = []  # the last turn first
        n_tokens = 0
        for speaker, text in reversed(turns):
            if encoded and (n_tokens > room or len(text) > self.longest_text):
                break
            ids = self.encode(text)
            encoded.append((speaker, ids))
            n_tokens += len(ids)
        try:
            return self.generator.request(encoded[::-1], sampling, n, beginning)
        except UserError as error:
            raise self.too_long(str(error).removeprefix("prompt: ")) from None


def slots_that_fit(config: GPT2Config, settings: ServerSettings) -> int:
    """How many sequences the KV cache holds: limited by `slots` and `cache_mb`, at least one."""
    bytes_per_slot = 2 * 4 * config.n_layer * config.n_embd * config.n_positions  # float32
    return max(1, min(settings.slots, settings.cache_mb * 2**20 // bytes_per_slot))


def load_served_model(directory: Path, name: str, settings: ServerSettings) -> ServedModel:
    """Read a model directory and start an engine, which then has run once. Raises UserError.

    This happens in a thread of its own, which ends: each thread that computes keeps OpenMP threads,
    and with more of them than cores a step takes two to three times as long.
    """
    with ThreadPoolExecutor(1, "load") as thread:
        return thread.submit(_load, directory, name, settings).result()


def _load(directory: Path, name: str, settings: ServerSettings) -> ServedModel:
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    model, tokenizer, task = pretrained.load_model(directory, default_device())
    slots = slots_that_fit(model.config, settings)
    generator = TextGenerator(
        model,
        tokenizer,
        task,
        slots,
        settings.dtype,
        prefix_cache=settings.prefix_cache,
        defaults=pretrained.answer_defaults(directory),
    )
    token_types = [1] if task == "chatlm" else None
    generate(generator.engine, [Request([0], token_types)])
    tune_memory()
    return ServedModel(name, generator, settings)

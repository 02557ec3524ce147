"""gptchat: text and dialogues in, a chat model of your own out. The names below are imported when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptchat.data.tokenizer import Tokenizer
    from gptchat.inference.engine import Engine, Request
    from gptchat.inference.sampling import Sampling
    from gptchat.model.gpt2 import GPT2
    from gptchat.model.pretrained import load_model as load

__all__ = ["GPT2", "Engine", "Request", "Sampling", "Tokenizer", "load"]

_HOMES = {  # name: (module, name there)
    "GPT2": ("gptchat.model.gpt2", "GPT2"),
    "Engine": ("gptchat.inference.engine", "Engine"),
    "Request": ("gptchat.inference.engine", "Request"),
    "Sampling": ("gptchat.inference.sampling", "Sampling"),
    "Tokenizer": ("gptchat.data.tokenizer", "Tokenizer"),
    "load": ("gptchat.model.pretrained", "load_model"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gptchat' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)

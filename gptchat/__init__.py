"""gptchat: from text and dialogues to a GPT-2 chat model of your own.

The public names are imported on first use, so `import gptchat` itself does not load torch:

    from gptchat import Engine, Request, Sampling, load
    from gptchat.inference.engine import generate

    model, tokenizer, task = load("out/lm/model")
    request = Request(tokenizer.encode("Good morning"), sampling=Sampling(max_new_tokens=20))
    candidates = generate(Engine(model, slots=1), [request])[0]
    print(tokenizer.decode(candidates[0].ids))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptchat.data.tokenizer import Tokenizer
    from gptchat.inference.engine import Engine, Request
    from gptchat.inference.sampling import Sampling
    from gptchat.model.gpt2 import GPT2
    from gptchat.model.pretrained import load_model as load

__all__ = ["GPT2", "Engine", "Request", "Sampling", "Tokenizer", "load"]

_DEFINITIONS = {  # public name: (module, name in that module)
    "GPT2": ("gptchat.model.gpt2", "GPT2"),
    "Engine": ("gptchat.inference.engine", "Engine"),
    "Request": ("gptchat.inference.engine", "Request"),
    "Sampling": ("gptchat.inference.sampling", "Sampling"),
    "Tokenizer": ("gptchat.data.tokenizer", "Tokenizer"),
    "load": ("gptchat.model.pretrained", "load_model"),
}


def __getattr__(name: str) -> Any:
    if name not in _DEFINITIONS:
        raise AttributeError(f"module 'gptchat' has no attribute {name!r}")
    module, attribute = _DEFINITIONS[name]
    return getattr(importlib.import_module(module), attribute)

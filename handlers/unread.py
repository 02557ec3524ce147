"""The fields of OpenAI's API that this server does not read: ignored, or refused.

Clients send more than a server needs: what another server understands, or what is neutral. So on
OpenAI's paths whatever is not read is ignored, known or not, and counted in the metrics by name.
Names that are not in IGNORED or UNAVAILABLE are counted together as OTHER: a client chooses them,
and must not be able to fill the metrics, or write into the log.

UNAVAILABLE are the fields that ask for another kind of answer: only their neutral values are
ignored. The table in README.md says the same; a test sends each of its lines.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

from handlers.fields import Refusal


class Unavailable(NamedTuple):
    """A field's values that change nothing, and why no other one can be had."""

    neutral: Collection[Any]
    reason: str


NO_TOOLS = "this model calls no tools"
UNAVAILABLE = {
    "tools": Unavailable([[]], NO_TOOLS),
    "tool_choice": Unavailable(["auto", "none"], NO_TOOLS),
    "functions": Unavailable([[]], NO_TOOLS),
    "function_call": Unavailable(["auto", "none"], NO_TOOLS),
    "response_format": Unavailable([{"type": "text"}], "this model writes free text only"),
    "modalities": Unavailable([["text"]], "this model writes text only"),
    "web_search_options": Unavailable([], "this model searches nothing"),
    "suffix": Unavailable([""], "this model continues a text and fills no gap"),
    "best_of": Unavailable([1], "all candidates are returned"),
}
IGNORED = (
    # OpenAI's
    "audio",
    "include_obfuscation",
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
    # other servers'
    "add_generation_prompt",
    "cache_prompt",
    "chat_template_kwargs",
    "id_slot",
    "keep_alive",
    "mirostat",
    "options",
    "priority",
    "skip_special_tokens",
    "tfs_z",
    "typical_p",
)
OTHER = "other"


def check_unread(values: dict[str, Any]) -> set[str]:
    """The names under which unread fields are counted.

    Raises Refusal for one that would change the answer.
    """
    for name, value in values.items():
        if name in UNAVAILABLE and value not in UNAVAILABLE[name].neutral:
            raise Refusal(f"{name} is {value!r:.60}: {UNAVAILABLE[name].reason}", param=name)
    return set(map(counted_name, values))


def counted_name(name: str) -> str:
    return name if name in UNAVAILABLE or name in IGNORED else OTHER

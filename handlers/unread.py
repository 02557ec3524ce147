"""The fields of OpenAI's API that this server does not read: ignored, or refused.

Clients send more than a server needs: what another server understands, or what is neutral. So on
OpenAI's paths whatever is not read is ignored, known or not, and counted in the metrics by name.
Names that are not in IGNORED or UNAVAILABLE are counted together as OTHER: a client chooses them,
and must not be able to fill the metrics, or write into the log.

UNAVAILABLE are fields that ask for another answer: only their neutral values are ignored.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

from handlers.body import Refusal


class Unavailable(NamedTuple):
    """A field's values that change nothing, and why no other one can be had."""

    neutral: Collection[Any]
    reason: str


NO_TOOLS = "this model calls no tools"
NO_CONSTRAINT = "this model writes free text only"
NO_SUCH_DRAW = "this model's tokens are not drawn so"
BANNED_END = "this model's end is banned by logit_bias"
NOTHING: tuple[Any, ...] = ({}, [], "")
UNAVAILABLE = {
    "tools": Unavailable([[]], NO_TOOLS),
    "tool_choice": Unavailable(["auto", "none"], NO_TOOLS),
    "functions": Unavailable([[]], NO_TOOLS),
    "function_call": Unavailable(["auto", "none"], NO_TOOLS),
    "response_format": Unavailable([{"type": "text"}], NO_CONSTRAINT),
    "guided_json": Unavailable(NOTHING, NO_CONSTRAINT),
    "guided_regex": Unavailable(NOTHING, NO_CONSTRAINT),
    "guided_choice": Unavailable(NOTHING, NO_CONSTRAINT),
    "guided_grammar": Unavailable(NOTHING, NO_CONSTRAINT),
    "grammar": Unavailable(NOTHING, NO_CONSTRAINT),
    "json_schema": Unavailable(NOTHING, NO_CONSTRAINT),
    "structured_outputs": Unavailable(NOTHING, NO_CONSTRAINT),
    "format": Unavailable(NOTHING, NO_CONSTRAINT),
    "modalities": Unavailable([["text"]], "this model writes text only"),
    "web_search_options": Unavailable([], "this model searches nothing"),
    "suffix": Unavailable([""], "this model continues a text and fills no gap"),
    "stop_token_ids": Unavailable([[]], "this model stops at strings (stop) only"),
    "include_stop_str_in_output": Unavailable([False], "a stop string is left out here"),
    "ignore_eos": Unavailable([False], BANNED_END),
    "ban_eos_token": Unavailable([False], BANNED_END),
    "typical_p": Unavailable([1, 0], NO_SUCH_DRAW),
    "typical": Unavailable([1, 0], NO_SUCH_DRAW),
    "tfs_z": Unavailable([1], NO_SUCH_DRAW),
    "tfs": Unavailable([1], NO_SUCH_DRAW),
    "top_a": Unavailable([0], NO_SUCH_DRAW),
    "top_n_sigma": Unavailable([-1, 0], NO_SUCH_DRAW),
    "epsilon_cutoff": Unavailable([0], NO_SUCH_DRAW),
    "eta_cutoff": Unavailable([0], NO_SUCH_DRAW),
    "penalty_alpha": Unavailable([0], NO_SUCH_DRAW),
    "guidance_scale": Unavailable([1], NO_SUCH_DRAW),
    "mirostat": Unavailable([0], NO_SUCH_DRAW),
    "mirostat_mode": Unavailable([0], NO_SUCH_DRAW),
    "dynatemp_range": Unavailable([0], NO_SUCH_DRAW),
    "xtc_probability": Unavailable([0], NO_SUCH_DRAW),
    "dry_multiplier": Unavailable([0], NO_SUCH_DRAW),
    "smoothing_factor": Unavailable([0], NO_SUCH_DRAW),
    "no_repeat_ngram_size": Unavailable([0], NO_SUCH_DRAW),
    "use_beam_search": Unavailable([False], NO_SUCH_DRAW),
    "num_beams": Unavailable([1], NO_SUCH_DRAW),
    "allowed_token_ids": Unavailable([[]], NO_SUCH_DRAW),
    "options": Unavailable([{}], "this server reads settings beside the messages"),
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
    "continue_final_message",
    "id_slot",
    "keep_alive",
    "priority",
    "skip_special_tokens",
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

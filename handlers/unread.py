"""The fields on OpenAI's paths that this server does not read: ignored, or refused.

Clients send fields that other servers understand, so an unknown field is ignored. A field in
UNAVAILABLE asks for another answer: only its neutral values, which change nothing, are ignored.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from handlers.body import Refusal


class Unavailable(NamedTuple):
    """A field's neutral values, and why no other one can be had."""

    neutral: Sequence[Any]
    reason: str


NO_TOOLS = "this model calls no tools"
NO_CONSTRAINT = "this model writes free text only"
NO_SUCH_DRAW = "this model's tokens are not drawn so"
BANNED_END = "this model's end is banned by logit_bias"
CONSTRAINTS = """
    guided_json guided_regex guided_choice guided_grammar grammar json_schema structured_outputs
    format
"""
SAMPLERS_OFF_AT_0 = """
    top_a epsilon_cutoff eta_cutoff penalty_alpha mirostat mirostat_mode dynatemp_range
    xtc_probability dry_multiplier smoothing_factor no_repeat_ngram_size
"""
SAMPLERS_OFF_AT_1 = "tfs_z tfs guidance_scale num_beams"
UNAVAILABLE = {
    "tools": Unavailable([[]], NO_TOOLS),
    "tool_choice": Unavailable(["auto", "none"], NO_TOOLS),
    "functions": Unavailable([[]], NO_TOOLS),
    "function_call": Unavailable(["auto", "none"], NO_TOOLS),
    "response_format": Unavailable([{"type": "text"}], NO_CONSTRAINT),
    **dict.fromkeys(CONSTRAINTS.split(), Unavailable([{}, [], ""], NO_CONSTRAINT)),
    "modalities": Unavailable([["text"]], "this model writes text only"),
    "web_search_options": Unavailable([], "this model searches nothing"),
    "suffix": Unavailable([""], "this model continues a text and fills no gap"),
    "stop_token_ids": Unavailable([[]], "this model stops at strings (stop) only"),
    "include_stop_str_in_output": Unavailable([False], "a stop string is left out here"),
    "ignore_eos": Unavailable([False], BANNED_END),
    "ban_eos_token": Unavailable([False], BANNED_END),
    **dict.fromkeys(SAMPLERS_OFF_AT_0.split(), Unavailable([0], NO_SUCH_DRAW)),
    **dict.fromkeys(SAMPLERS_OFF_AT_1.split(), Unavailable([1], NO_SUCH_DRAW)),
    "typical_p": Unavailable([1, 0], NO_SUCH_DRAW),
    "typical": Unavailable([1, 0], NO_SUCH_DRAW),
    "top_n_sigma": Unavailable([-1, 0], NO_SUCH_DRAW),
    "use_beam_search": Unavailable([False], NO_SUCH_DRAW),
    "allowed_token_ids": Unavailable([[]], NO_SUCH_DRAW),
    "options": Unavailable([{}], "this server reads settings beside the messages"),
}


def check_unread(body: dict[str, Any]) -> None:
    """Raise Refusal for a field that would change the answer."""
    for name, value in body.items():
        if name in UNAVAILABLE and value not in UNAVAILABLE[name].neutral:
            raise Refusal(f"{name} is {value!r:.60}: {UNAVAILABLE[name].reason}", param=name)

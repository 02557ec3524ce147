"""How a request draws its tokens: settings, declared once with default, range and help.

Their meaning is that of transformers' `generate` and OpenAI's API; `draw.py` applies them.
Terminal, server and page take names, defaults, ranges and help from `SETTINGS`.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gptchat.inference.text import WordFilter
from gptchat.settings import Setting, check_all, declared, setting

LARGEST_BIAS = 100  # as in OpenAI's API


@dataclass(frozen=True)
class Sampling:
    """How one request draws its tokens. Raises ValueError for a setting of another type or range.

    `logit_bias` maps an id to what is added to its logit; it does not revive a suppressed id. The
    same `seed` gives the same answer, up to the rounding that `engine` describes.
    """

    temperature: float = setting(1.0, "0 takes the likeliest token", min=0, max=100)
    top_k: int = setting(0, "draw from this many of the likeliest tokens; 0: from all", min=0)
    top_p: float = setting(
        1.0, "draw from the likeliest tokens that have this probability together", min=0, max=1
    )
    min_p: float = setting(
        0.0, "leave out tokens below this share of the likeliest one's probability", min=0, max=1
    )
    repetition_penalty: float = setting(
        1.0, "1 is none (Keskar et al. 2019); counts prompt and answer", min=0.01, max=100
    )
    frequency_penalty: float = setting(
        0.0, "taken from a token's logit for each time the answer has had it", min=-2, max=2
    )
    presence_penalty: float = setting(
        0.0, "taken once from the logit of each token that the answer has had", min=-2, max=2
    )
    min_tokens: int = setting(
        0, "the model does not end an answer before; a stop string does", min=0
    )
    max_new_tokens: int = setting(64, "of one answer", min=0)
    whole_characters: int = setting(
        1, "1: no token that would break a character is drawn; 0: any may be", min=0, max=1
    )
    seed: int = setting(0, "the same seed gives the same answer")
    logprobs: int | None = setting(
        None, "how many of the best tokens are listed with each token's log-probability", min=0
    )
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    word_filter: WordFilter | None = None

    def __post_init__(self) -> None:
        check_all(self)
        for id, bias in self.logit_bias.items():
            try:
                ID.check(id)
                BIAS.check(bias)
            except ValueError as error:
                raise ValueError(f"logit_bias of {id!r}: {error}") from None

    def for_item(self, number: int) -> "Sampling":
        """The settings for item `number` of a list, with noise of its own: seed + number."""
        return replace(self, seed=self.seed + number)


ANOTHER_SEED = -1  # as people write it: a new one each time


def chosen_seed(given: int) -> int:
    """The given seed, or a random one for ANOTHER_SEED."""
    return secrets.randbits(31) if given == ANOTHER_SEED else given


# The settings that a person tunes, by name
SETTINGS = {
    name: one for name, one in declared(Sampling).items() if name not in ("seed", "logprobs")
}
ID = Setting("id", int, False, 0, "a token's id", {"min": 0})
BIAS = Setting("bias", float, False, 0, "", {"min": -LARGEST_BIAS, "max": LARGEST_BIAS})

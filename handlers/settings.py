"""The settings that a request of every API may choose: their declaration, and the Sampling of them.

Numbers, ranges and help are those of `sampling.SETTINGS`. The limits here are constants: they bound
what one request can cost, and are far above what people ask for.
"""

from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType, defstruct

from gptchat.inference.sampling import ANOTHER_SEED, LARGEST_BIAS, SETTINGS, Sampling, chosen_seed
from gptchat.inference.text import WordFilter
from handlers.body import SYNONYMS, Refusal
from handlers.served_model import ServedModel

MOST_CANDIDATES = 16  # of one prompt; never more than there are slots
MOST_ANSWERS = 64  # of one request: prompts times candidates
MOST_STOPS = 8
MOST_BAD_WORDS = 64
MOST_WORD_CHARS = 200  # of either: the tables that find a word grow with the square of its length
MOST_BIASES = 300
MOST_LOGPROBS = 20  # tokens listed beside the drawn one
LARGEST_INTEGER = 10**9  # of a setting that has no upper limit of its own
LARGEST_LENGTH = (1 << 63) - 1  # that is cut down to what fits

Word = Annotated[str, Meta(min_length=1, max_length=MOST_WORD_CHARS)]
Stops = Word | Annotated[list[Word], Meta(max_length=MOST_STOPS)]
BadWords = Word | Annotated[list[Word], Meta(max_length=MOST_BAD_WORDS)]
TokenId = Annotated[str, Meta(pattern="^(0|[1-9][0-9]{0,8})$")]  # JSON's keys are strings
Bias = Annotated[float, Meta(ge=-LARGEST_BIAS, le=LARGEST_BIAS)]
Biases = Annotated[dict[TokenId, Bias], Meta(max_length=MOST_BIASES)]
Seed = Annotated[
    int,
    Meta(
        ge=-(1 << 63),
        le=(1 << 63) - 1,
        description="the same seed gives the same answer; -1: another each time",
    ),
]


def with_settings(
    request: type[Struct],
    name: str,
    model: ServedModel,
    defaults: Sampling,
    new_tokens: int,
    candidates: int,
    longest: int = LARGEST_LENGTH,
) -> type[Struct]:
    """A request's declaration with the settings of all APIs beside its own fields.

    `new_tokens` and `candidates` are the defaults of these two, `longest` is the largest length
    that may be asked for.
    """
    most = min(MOST_CANDIDATES, model.generator.engine.slots)
    help = SETTINGS["max_new_tokens"].help
    fields: dict[str, tuple[Any, Any]] = {
        setting: (_number(setting), getattr(defaults, setting)) for setting in SETTINGS
    }
    fields["max_new_tokens"] = Annotated[int, Meta(ge=0, le=longest, description=help)], new_tokens
    n_help = "candidates; one if they are streamed in the original's API"
    fields["n"] = Annotated[int, Meta(ge=1, le=most, description=n_help)], min(candidates, most)
    fields["logit_bias"] = Biases, {}
    fields["seed"] = Seed | UnsetType, UNSET
    fields["stop"] = Stops, []
    fields["bad_words"] = BadWords, []
    fields["stream"] = bool, False
    for setting, names in SYNONYMS.items():
        kind, default = fields[setting]
        mark = Meta(extra_json_schema={"x-setting": setting})
        for other in names:
            fields.setdefault(other, (Annotated[kind, mark], default))
    declared = [(name, *field) for name, field in fields.items()]
    return defstruct(name, declared, bases=(request,), kw_only=True)


def _number(name: str) -> Any:
    """The type of a setting that `sampling.SETTINGS` declares."""
    declared = SETTINGS[name]
    low, high = declared.rules["min"], declared.rules.get("max", LARGEST_INTEGER)
    return Annotated[declared.type, Meta(ge=low, le=high, description=declared.help)]


def words(given: str | list[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


class SamplingMaker:
    """Makes the Sampling of each prompt of a request. Raises Refusal.

    Prompt number i has the seed + i, so it draws its own noise, and is answered as it would be
    alone with that seed.
    """

    def __init__(self, model: ServedModel, asked: Any, logprobs: int | None = None):
        tokenizer = model.generator.tokenizer
        for id in asked.logit_bias:
            if int(id) >= tokenizer.vocab_size:
                message = f"logit_bias names token {id}; wanted ids below {tokenizer.vocab_size}"
                raise Refusal(message, param="logit_bias")
        asked.seed = chosen_seed(ANOTHER_SEED if asked.seed is UNSET else asked.seed)
        forbidden = words(asked.bad_words)
        self.most_new_tokens = min(asked.max_new_tokens, model.most_new_tokens)
        self.values = {name: getattr(asked, name) for name in SETTINGS} | {
            "logit_bias": {int(id): bias for id, bias in asked.logit_bias.items()},
            "word_filter": WordFilter(tokenizer, forbidden) if forbidden else None,
            "logprobs": logprobs,
            "seed": asked.seed,
        }

    def make(self, room: int, number: int = 0) -> Sampling:
        """For prompt `number`, beside which `room` tokens are left of the context."""
        values = self.values | {"max_new_tokens": min(self.most_new_tokens, room)}
        return Sampling(**values).for_item(number)

"""The settings that a request of every API may choose, and the plan that they make.

Numbers, ranges and help are those of `sampling.SETTINGS`. The limits here are constants: they bound
what one request can cost, and are far above what people ask for. `python -m handlers.settings`
writes the tables in handlers/README.md.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, defstruct

from gptchat.config import ServerSettings
from gptchat.files import shipped
from gptchat.inference.pick import PICKS
from gptchat.inference.sampling import ANOTHER_SEED, LARGEST_BIAS, SETTINGS, Sampling, chosen_seed
from gptchat.inference.text import WordFilter
from gptchat.settings import table, update_tables
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
    new_tokens: int,
    candidates: int,
    longest: int = LARGEST_LENGTH,
) -> type[Struct]:
    """A request's declaration with the settings of all APIs beside its own fields.

    The model's own settings are the defaults. `new_tokens` and `candidates` are those of the length
    and of `n`; `longest` is the largest length that may be asked for.
    """
    most = min(MOST_CANDIDATES, model.generator.engine.slots)
    help = SETTINGS["max_new_tokens"].help
    fields: dict[str, tuple[Any, Any]] = {
        setting: (_number(setting), getattr(model.generator.sampling, setting))
        for setting in SETTINGS
    }
    fields["max_new_tokens"] = Annotated[int, Meta(ge=0, le=longest, description=help)], new_tokens
    n_help = "candidates; one if they are streamed in the original's API"
    fields["n"] = Annotated[int, Meta(ge=1, le=most, description=n_help)], min(candidates, most)
    best_help = "candidates drawn for each prompt, of which the n best are given"
    slots = model.generator.engine.slots
    best_of = Annotated[int, Meta(ge=1, le=slots, description=best_help)]
    fields["best_of"] = best_of | UnsetType, UNSET
    fields["pick"] = Literal[PICKS] | UnsetType, UNSET
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


class Plan:
    """How the candidates of a request are drawn, and by which rule `pick` the best are chosen.

    `best_of` candidates are drawn for each prompt. Raises Refusal.
    """

    def __init__(
        self,
        model: ServedModel,
        asked: Any,
        default_pick: str = "median",
        default_best_of: int = 1,
        logprobs: int | None = None,
    ):
        self.pick, self.best_of = _choice(asked, default_pick, default_best_of)
        try:
            model.generator.check_pick(self.pick, model.generator.task)
        except ValueError as error:
            raise Refusal(str(error), param="pick") from None
        tokenizer = model.generator.tokenizer
        for id in asked.logit_bias:
            if int(id) >= tokenizer.vocab_size:
                message = f"logit_bias names token {id}; wanted ids below {tokenizer.vocab_size}"
                raise Refusal(message, param="logit_bias")
        if self.best_of > 1 and self.pick == "mmi":
            logprobs = logprobs or 0
        asked.seed = chosen_seed(ANOTHER_SEED if asked.seed is UNSET else asked.seed)
        forbidden = words(asked.bad_words)
        self.most_new_tokens = min(asked.max_new_tokens, model.most_new_tokens)
        self.values = {name: getattr(asked, name) for name in SETTINGS} | {
            "logit_bias": {int(id): bias for id, bias in asked.logit_bias.items()},
            "word_filter": WordFilter(tokenizer, forbidden) if forbidden else None,
            "logprobs": logprobs,
            "seed": asked.seed,
        }

    def sampling(self, room: int, number: int = 0) -> Sampling:
        """For prompt `number`, beside which `room` tokens are left of the context.

        Each prompt draws its own noise: it is answered as alone with the seed + number.
        """
        values = self.values | {"max_new_tokens": min(self.most_new_tokens, room)}
        return Sampling(**values).for_item(number)


def _choice(asked: Any, default_pick: str, default_best_of: int) -> tuple[str, int]:
    """The rule, and among how many. More than are wanted are drawn if that is asked for, or by
    default for a single answer that is not greedy."""
    pick = default_pick if asked.pick is UNSET else asked.pick
    if asked.best_of is UNSET:
        is_plain = pick == "first" or asked.n > 1 or asked.temperature == 0
        return pick, asked.n if is_plain else default_best_of
    if asked.best_of < asked.n:
        message = f"best_of is {asked.best_of}; wanted at least n, {asked.n}"
        raise Refusal(message, param="best_of")
    if pick == "first" and asked.pick is UNSET:
        pick = "median"
    return pick, asked.best_of


def tables() -> dict[str, str]:
    """The tables of handlers/README.md, by the names in their markers."""
    every_api = table(Sampling, leave_out=("logprobs", "seed"))  # declared by each API
    return {"ServerSettings": table(ServerSettings), "Sampling": every_api}


if __name__ == "__main__":
    update_tables(shipped("handlers") / "README.md", tables())

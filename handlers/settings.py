"""The settings that every API has, and the plan that a request's settings make.

Numbers, ranges and help are those of `sampling.SETTINGS`. The constants here bound what one request
can cost. `python -m handlers.settings` writes the tables in handlers/README.md.
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
SEED_HELP = "the same seed gives the same answer; -1: another each time"
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1, description=SEED_HELP)]


def with_settings(
    request: type[Struct],
    name: str,
    model: ServedModel,
    new_tokens: int,
    candidates: int,
    longest: int = LARGEST_LENGTH,
) -> type[Struct]:
    """A request's declaration with the settings of all APIs beside its own fields.

    Their defaults are the model's, except for the length (`new_tokens`) and `n` (`candidates`).
    """
    slots = model.generator.engine.slots
    most = min(MOST_CANDIDATES, slots)
    n_help = "candidates; one if they are streamed in the original's API"
    best_help = "candidates drawn for each prompt, of which the n best are given"
    fields: dict[str, tuple[Any, Any]] = {
        setting: (
            _number(setting, declared.rules["min"], declared.rules.get("max", LARGEST_INTEGER)),
            getattr(model.generator.sampling, setting),
        )
        for setting, declared in SETTINGS.items()
    }
    fields |= {
        "max_new_tokens": (_number("max_new_tokens", 0, longest), new_tokens),
        "n": (Annotated[int, Meta(ge=1, le=most, description=n_help)], min(candidates, most)),
        "best_of": (
            Annotated[int, Meta(ge=1, le=slots, description=best_help)] | UnsetType,
            UNSET,
        ),
        "pick": (Literal[PICKS] | UnsetType, UNSET),
        "logit_bias": (Biases, {}),
        "seed": (Seed | UnsetType, UNSET),
        "stop": (Stops, []),
        "bad_words": (BadWords, []),
        "stream": (bool, False),
    }
    for setting, names in SYNONYMS.items():
        kind, default = fields[setting]
        mark = Meta(extra_json_schema={"x-setting": setting})
        for other in names:
            fields.setdefault(other, (Annotated[kind, mark], default))
    declared = [(name, *field) for name, field in fields.items()]
    return defstruct(name, declared, bases=(request,), kw_only=True)


def _number(name: str, low: float, high: float) -> Any:
    declared = SETTINGS[name]
    return Annotated[declared.type, Meta(ge=low, le=high, description=declared.help)]


def words(given: str | list[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


class Plan:
    """How a request's candidates are drawn: `best_of` for each prompt, the best chosen by `pick`.

    More than n are drawn if `best_of` asks for it, or by default for a single answer that is not
    greedy. Raises Refusal.
    """

    def __init__(
        self,
        model: ServedModel,
        asked: Any,
        default_pick: str = "median",
        default_best_of: int = 1,
        logprobs: int | None = None,
    ):
        self.logprobs = logprobs
        self.pick = default_pick if asked.pick is UNSET else asked.pick
        if asked.best_of is UNSET:
            is_plain = self.pick == "first" or asked.n > 1 or asked.temperature == 0
            self.best_of = asked.n if is_plain else default_best_of
        else:
            self.best_of = asked.best_of
            if self.best_of < asked.n:
                message = f"best_of is {self.best_of}; wanted at least n, {asked.n}"
                raise Refusal(message, param="best_of")
            if asked.pick is UNSET and self.pick == "first":
                self.pick = "median"
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
            logprobs = logprobs or 0  # which mmi needs
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
        """For a prompt that leaves `room` tokens of the context; `number` is added to the seed."""
        values = self.values | {"max_new_tokens": min(self.most_new_tokens, room)}
        return Sampling(**values).for_item(number)


def tables() -> dict[str, str]:
    """The tables of handlers/README.md, by the names in their markers."""
    every_api = table(Sampling, leave_out=("logprobs", "seed"))  # declared by each API
    return {"ServerSettings": table(ServerSettings), "Sampling": every_api}


if __name__ == "__main__":
    update_tables(shipped("handlers") / "README.md", tables())

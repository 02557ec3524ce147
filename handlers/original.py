"""The original program's API: a context in, a response out, picked among candidates.

It is strict: an unknown field is refused, and so is a length that does not fit.
"""

import json
import time
from typing import Annotated, Any

from msgspec import Meta, Struct

from gptchat.data.dialogue import SPEAKERS, alternate
from gptchat.inference.pick import CANDIDATES
from handlers.answers import Choice, Generation
from handlers.body import SYNONYMS, Refusal
from handlers.served_model import ServedModel
from handlers.settings import Plan, with_settings

MOST_TURNS = 1000
NEW_TOKENS = 64  # default length of an answer


class TextRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """To a language model, which continues one text."""

    context: str


class TurnsRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """To a ChatLM: one text or the turns of a dialogue, oldest first, the last one the user's."""

    context: str | Annotated[list[str], Meta(min_length=1, max_length=MOST_TURNS)]
    response: Annotated[str, Meta(description="the first words of the answer")] = ""


class ModelInfo(Struct):
    """All candidates, and figures."""

    model: str
    output: list[str]
    finish_reason: list[str]
    prompt_tokens: int
    seed: int
    completion_tokens: list[int]
    seconds: float
    first_token_seconds: float


class OriginalAnswer(Struct):
    """`response` is the picked candidate; `request` has the context and the response given."""

    response: str
    request: dict[str, Any]
    model_info: ModelInfo


class OriginalEvent(Struct):
    """A piece of the answer."""

    token: str


class Original(Generation):
    """Five candidates, of which the one of median length is the response; one if it is streamed."""

    ranks_all = True

    kind = "original"
    path = ""
    whole_answer = OriginalAnswer
    chunk = OriginalEvent

    @classmethod
    def declare(cls, model: ServedModel) -> type[Struct]:
        request = TurnsRequest if model.chats else TextRequest
        new_tokens = min(NEW_TOKENS, model.chat_new_tokens if model.chats else model.n_ctx)
        longest = model.most_new_tokens
        return with_settings(request, cls.kind, model, new_tokens, CANDIDATES, longest)

    def __init__(self, model: ServedModel, id: str, asked: Any, body: dict[str, Any]):
        if asked.stream and not given(body, "n"):
            asked.n = 1
        if asked.stream and asked.n > 1:
            raise Refusal(f"n is {asked.n}, wanted 1 with stream", param="n")
        self.request = {key: value for key, value in body.items() if key in ("context", "response")}
        plan = Plan(model, asked)
        beginning: list[int] = []
        if model.chats:
            beginning = model.encode(asked.response)
            context = asked.context
            turns = [context] if isinstance(context, str) else context
            dialogue = alternate(turns, last_speaker=SPEAKERS["user"])
            request = model.reply(dialogue, beginning, plan.sampling(model.n_ctx), plan.best_of)
        else:
            ids = model.prompt(asked.context)
            room = model.n_ctx - len(ids)
            if given(body, "max_new_tokens") and asked.max_new_tokens > room:
                found = f"it has {len(ids)} tokens, with {asked.max_new_tokens} to be generated"
                raise model.too_long(found)
            request = model.continuation(ids, plan.sampling(room), plan.best_of, score=False)
        super().__init__(model, id, asked, plan, [request], beginning)
        self.frame_bytes += len(json.dumps(self.request))

    def event(self, choice: Choice) -> OriginalEvent:
        return OriginalEvent(choice.unsent_text)

    def last_events(self) -> list[Struct]:
        return [self.whole()]

    def whole(self) -> OriginalAnswer:
        now = time.monotonic()
        texts = [choice.text for choice in self.choices]
        info = ModelInfo(
            model=self.model.name,
            output=texts,
            finish_reason=[choice.finish_reason for choice in self.choices],
            prompt_tokens=self.n_prompt_tokens,
            seed=self.asked.seed,
            completion_tokens=[choice.n_tokens for choice in self.choices],
            seconds=round(now - self.began, 4),
            first_token_seconds=round((self.first_token or now) - self.began, 4),
        )
        return OriginalAnswer(self.best[0].text, self.request, info)


def given(body: dict[str, Any], setting: str) -> bool:
    return any(name in body for name in SYNONYMS[setting])

"""OpenAI's completions and chat completions.

They accept what clients of larger models send: an unknown field is ignored if it may be
(`unread.py`), and a length is cut to what fits.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

from gptchat.data.dialogue import SPEAKERS, TextTurn
from gptchat.data.tokenizer import Tokenizer
from gptchat.inference.pick import CANDIDATES
from handlers.answers import Choice, Generation, ScoredToken
from handlers.body import SYNONYMS, Refusal
from handlers.original import MOST_TURNS
from handlers.served_model import ServedModel
from handlers.settings import MOST_ANSWERS, MOST_LOGPROBS, Plan, with_settings
from handlers.unread import check_unread

COMPLETION_TOKENS = 16  # OpenAI's default length of a completion

Best = Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)]
FinishReason = Literal["stop", "length"]


# --- requests


class StreamOptions(Struct):
    """`include_usage`: the stream ends with the numbers of tokens."""

    include_usage: bool | None = False


class OpenAIRequest(Struct, kw_only=True):
    """What both routes have."""

    model: str | UnsetType = UNSET
    stream_options: StreamOptions = field(default_factory=StreamOptions)


class CompletionRequest(OpenAIRequest, kw_only=True):
    """`prompt` is a text, token ids, or a list of either; `echo` with `logprobs` scores it."""

    prompt: str | list[int | str | list[int]] = ""
    echo: bool = False
    logprobs: Best | UnsetType = UNSET


class TextPart(Struct):
    """A part of a message's content."""

    text: str


class Message(Struct):
    """One that is the assistant's may have no content, and then counts as nothing said."""

    role: Annotated[str, Meta(pattern=f"^({'|'.join(SPEAKERS)})$")]
    content: str | list[TextPart] | None = None


class ChatRequest(OpenAIRequest, kw_only=True):
    """If the last message is the assistant's, the answer continues it."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MOST_TURNS)]
    logprobs: bool = False
    top_logprobs: Best = 0


# --- answers and events


class Usage(Struct):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextLogprobs(Struct):
    """The first token of a text has no log-probability."""

    tokens: list[str]
    text_offset: list[int]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]


class TextChoice(Struct):
    """A completion, or a piece of one."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: TextLogprobs | None


class BestToken(Struct):
    """A token's text, or `bytes:` and the bytes of a part of a character."""

    token: str
    logprob: float | None
    bytes: list[int]


class ChatToken(BestToken):
    """A token of the answer."""

    top_logprobs: list[BestToken]


class ChatLogprobs(Struct):
    """For each token of the answer."""

    content: list[ChatToken]


class AnswerMessage(Struct):
    """The message that the model writes."""

    content: str
    role: Literal["assistant"] = "assistant"


class Delta(Struct):
    """A piece of the message; the role comes with the first one."""

    content: str
    role: Literal["assistant"] | UnsetType = UNSET


class ChatChoice(Struct):
    """A candidate."""

    index: int
    message: AnswerMessage
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None


class ChatChunkChoice(Struct):
    """A piece of a candidate."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None


class Frame(Struct, kw_only=True):
    """What all answers and events have; events have a usage only if it was asked for."""

    id: str
    created: int
    model: str
    usage: Usage | None | UnsetType = UNSET


class Completion(Frame, kw_only=True):
    """The answer of completions, and its events."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class ChatCompletion(Frame, kw_only=True):
    """The answer of chat completions."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatChunk(Frame, kw_only=True):
    """An event of chat completions."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


# --- the two APIs


class OpenAIGeneration(Generation):
    id_prefix: ClassVar[str]

    def shape(self, choice: Choice, text: str, tokens: list[ScoredToken], is_whole: bool) -> Struct:
        """A choice in an answer, or a piece of it in an event."""
        raise NotImplementedError

    def event(self, choice: Choice) -> Struct:
        piece = self.shape(choice, choice.unsent_text, choice.unsent_tokens, is_whole=False)
        usage = None if self.asked.stream_options.include_usage else UNSET
        return self._frame(self.chunk, [piece], usage)

    def last_events(self) -> list[Struct]:
        if not self.asked.stream_options.include_usage:
            return []
        return [self._frame(self.chunk, [], self._usage())]

    def whole(self) -> Struct:
        choices = [self.shape(each, each.text, each.tokens, is_whole=True) for each in self.choices]
        return self._frame(self.whole_answer, choices, self._usage())

    def _frame(self, frame: type[Any], choices: list[Any], usage: Any) -> Struct:
        return frame(
            id=f"{self.id_prefix}-{self.id}",
            created=self.created,
            model=self.model.name,
            choices=choices,
            usage=usage,
        )

    def _usage(self) -> Usage:
        prompt, new = self.n_prompt_tokens, self.n_new_tokens
        return Usage(prompt, new, prompt + new)


class Completions(OpenAIGeneration):
    """Texts, continued."""

    kind = "completions"
    path = "v1/completions"
    whole_answer = chunk = Completion
    id_prefix = "cmpl"

    @classmethod
    def declare(cls, model: ServedModel) -> type[Struct]:
        return with_settings(CompletionRequest, cls.kind, model, COMPLETION_TOKENS, candidates=1)

    def __init__(self, model: ServedModel, id: str, asked: Any, body: dict[str, Any]):
        if "messages" in body:
            message = "completions take no messages: v1/chat/completions takes them"
            raise Refusal(message, param="messages")
        keep_greedy_plain(asked, body)
        prompts = prompts_of(asked.prompt, model)
        logprobs = None if asked.logprobs is UNSET else asked.logprobs
        plan = Plan(model, asked, logprobs=logprobs)
        if plan.pick == "mmi":
            message = "pick is 'mmi': a completion answers no context; wanted median or first"
            raise Refusal(message, param="pick")
        answers = len(prompts) * plan.best_of
        if answers > MOST_ANSWERS:
            message = f"{answers} answers at once, wanted at most {MOST_ANSWERS}"
            raise Refusal(message, param="prompt")
        requests = []
        for number, given in enumerate(prompts):
            ids = model.prompt(given)
            sampling = plan.sampling(model.n_ctx - len(ids), number)
            score = asked.echo and logprobs is not None
            requests.append(model.continuation(ids, sampling, plan.best_of, score))
        check_unread(body)
        super().__init__(model, id, asked, plan, requests, echo=asked.echo)

    def shape(self, choice: Choice, text: str, tokens: list[ScoredToken], is_whole: bool) -> Struct:
        logprobs = None if self.logprobs is None else text_logprobs(self.tokenizer, tokens)
        return TextChoice(choice.index, text, reason(choice), logprobs)


class Chat(OpenAIGeneration):
    """The next message of a dialogue. The system's messages count as the user's side."""

    kind = "chat"
    path = "v1/chat/completions"
    whole_answer = ChatCompletion
    chunk = ChatChunk
    id_prefix = "chatcmpl"

    @classmethod
    def declare(cls, model: ServedModel) -> type[Struct]:
        return with_settings(ChatRequest, cls.kind, model, model.chat_new_tokens, candidates=1)

    def __init__(self, model: ServedModel, id: str, asked: Any, body: dict[str, Any]):
        keep_greedy_plain(asked, body)
        logprobs = asked.top_logprobs if asked.logprobs else None
        candidates = model.generator.candidates
        if candidates == 1:
            candidates = CANDIDATES
        plan = Plan(model, asked, model.generator.default_pick, candidates, logprobs)
        turns = [turn for i, message in enumerate(asked.messages) for turn in said(message, i)]
        beginning: list[int] = []
        if turns and turns[-1][0] == SPEAKERS["assistant"]:
            beginning = model.encode(turns.pop()[1])
        request = model.reply(turns, beginning, plan.sampling(model.n_ctx), plan.best_of)
        check_unread(body)
        super().__init__(model, id, asked, plan, [request])

    def shape(self, choice: Choice, text: str, tokens: list[ScoredToken], is_whole: bool) -> Struct:
        logprobs = None if self.logprobs is None else chat_logprobs(self.tokenizer, tokens)
        if is_whole:
            return ChatChoice(choice.index, AnswerMessage(text), reason(choice), logprobs)
        delta = Delta(text, "assistant" if choice.sent_nothing else UNSET)
        return ChatChunkChoice(choice.index, delta, reason(choice), logprobs)


def keep_greedy_plain(asked: Any, body: dict[str, Any]) -> None:
    """Drop the model's own repetition penalty at temperature 0, which lm-eval sends."""
    penalty = SYNONYMS["repetition_penalty"]
    if body.get("temperature") == 0 and not any(name in body for name in penalty):
        asked.repetition_penalty = 1.0


def prompts_of(prompt: str | list[Any], model: ServedModel) -> Sequence[str | list[int]]:
    """The prompts of a request: one text or list of ids, or several. Raises Refusal."""
    n_vocab = model.generator.tokenizer.vocab_size
    one_list = isinstance(prompt, list) and all(isinstance(item, int) for item in prompt)
    prompts = [prompt] if isinstance(prompt, str) or one_list else prompt
    for number, given in enumerate(prompts):
        place = "prompt" if prompts[0] is prompt else f"prompt[{number}]"
        if isinstance(given, int):
            message = f"{place} is {given}, among texts; wanted a text or a list"
            raise Refusal(message, param="prompt")
        for id in given if isinstance(given, list) else ():
            if not 0 <= id < n_vocab:
                message = f"{place} has the id {id}; wanted ids from 0, below {n_vocab}"
                raise Refusal(message, param="prompt")
    return prompts


def said(message: Message, index: int) -> list[TextTurn]:
    """The turn of a message; none if the assistant says nothing. Raises Refusal."""
    content = message.content
    if content in (None, []):
        if message.role == "assistant":
            return []
        raise Refusal(f"messages[{index}].content is {content}: wanted text", param="messages")
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    return [(SPEAKERS[message.role], str(content))]


def reason(choice: Choice) -> Any:
    return choice.finish_reason or None


def text_logprobs(tokenizer: Tokenizer, tokens: list[ScoredToken]) -> TextLogprobs:
    """The log-probabilities of tokens; the drawn one is listed among the best, too."""
    best_of_each: list[dict[str, float | None] | None] = []
    for _, scored in tokens:
        best: dict[str, float | None] = {}
        for id, logprob in [*scored.top, (scored.token, scored.logprob)]:
            best[token_name(tokenizer, id)] = logprob
        best_of_each.append(None if scored.logprob is None else best)
    return TextLogprobs(
        tokens=[token_name(tokenizer, scored.token) for _, scored in tokens],
        text_offset=[offset for offset, _ in tokens],
        token_logprobs=[scored.logprob for _, scored in tokens],
        top_logprobs=best_of_each,
    )


def chat_logprobs(tokenizer: Tokenizer, tokens: list[ScoredToken]) -> ChatLogprobs:
    content = []
    for _, (drawn, logprob, top) in tokens:
        best = [
            BestToken(token_name(tokenizer, id), score, list(tokenizer.token_bytes[id]))
            for id, score in top
        ]
        raw = list(tokenizer.token_bytes[drawn])
        content.append(ChatToken(token_name(tokenizer, drawn), logprob, raw, best))
    return ChatLogprobs(content)


def token_name(tokenizer: Tokenizer, id: int) -> str:
    """The token's text, `bytes:\\xe3` for a part of a character, `[SEP]` for a special token."""
    raw = tokenizer.token_bytes[id]
    try:
        return raw.decode() or str(tokenizer.backend.id_to_token(id))
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

"""The server's OpenAPI description, built from the declarations that `jobs.py` checks bodies with.

`describe` gives what `GET v1/openapi.json` answers. Ranges come from `sampling.SETTINGS`, from the
server's settings and from the model, so they are those of the running server. Schemas are JSON
Schema (OpenAPI 3.1). What a schema cannot say stands in its description, `NOTES`.
"""

from math import inf
from typing import Any

from gptchat.data.dialogue import SPEAKERS
from gptchat.inference.generate import CHAT_SAMPLING
from gptchat.inference.rerank import CANDIDATES
from gptchat.inference.sampling import LARGEST_BIAS, SETTINGS, Sampling
from handlers.fields import MAX_WORD_CHARS, TOKEN_ID
from handlers.jobs import (
    CANDIDATES_NAMES,
    COMPLETION_TOKENS,
    LARGEST_INTEGER,
    LARGEST_LENGTH,
    LENGTH_NAMES,
    MOST_TURNS,
    OPENAI_SAMPLING,
)
from handlers.served_model import ServedModel
from handlers.unread import IGNORED, UNAVAILABLE

Schema = dict[str, Any]

JSON_TYPE = "application/json"
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean", "default": False}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
ANYTHING: Schema = {}
NOTES = (
    "A key with the value null counts as not given. The original's API refuses any other unknown "
    "key; on OpenAI's paths one is ignored. Of the keys that share an x-setting the original's API "
    "wants one at most; on OpenAI's paths the first one counts. There a length that does not fit "
    "is cut down; in the original's API a length within its range can still be refused where the "
    "context has no room for it. An x-maximum is that of a key, which JSON writes as a string."
)


def describe(model: ServedModel) -> Schema:
    """The description of one model's API, as JSON values."""
    root = f"/predictions/{model.name}"
    api = f"{root}/1.0/v1"
    is_chat_model = model.generator.task == "chatlm"
    paths: Schema = {
        root: {"post": _post("original", "OriginalAnswer")},
        f"{api}/completions": {"post": _post("completions", "Completion")},
        f"{api}/models": {"get": _get("ModelList", "this model in OpenAI's list of models")},
        f"{api}/models/{model.name}": {"get": _get("Model", "this model")},
        f"{api}/openapi.json": {"get": _get("Description", "this description")},
    }
    schemas = ANSWERS | {
        "original": _original(model),
        "completions": _completions(model),
    }
    if is_chat_model:
        paths[root]["get"] = _page()
        paths[f"{api}/chat/completions"] = {"post": _post("chat", "ChatCompletion")}
        schemas["chat"] = _chat(model)
    return {
        "openapi": "3.1.0",
        "info": {"title": f"gptchat: {model.name}", "version": "1.0.0", "description": NOTES},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


# --- requests


def _original(model: ServedModel) -> Schema:
    is_chat_model = model.generator.task == "chatlm"
    default_new_tokens = model.settings.default_new_tokens
    if is_chat_model:
        default_new_tokens = min(default_new_tokens, model.generator.n_ctx // 2)
    longest = min(model.settings.max_new_tokens, model.generator.n_ctx)
    properties = _shared(model, CHAT_SAMPLING, default_new_tokens, CANDIDATES, longest)
    properties["context"] = TEXT
    if is_chat_model:
        properties["context"] = {"anyOf": [TEXT, _list(TEXT, 1, MOST_TURNS)]}
        properties["response"] = TEXT | {"description": "the first words of the answer"}
    return _object(properties, ["context"])


def _completions(model: ServedModel) -> Schema:
    ids = _list({"type": "integer", "minimum": 0, "maximum": _vocab_size(model) - 1})
    prompt = [TEXT, ids]
    properties = _shared(model, OPENAI_SAMPLING, COMPLETION_TOKENS) | _openai(model)
    properties["prompt"] = {
        "anyOf": [*prompt, _list({"anyOf": prompt}, 1, model.settings.max_prompts)],
        "default": "",
    }
    properties["logprobs"] = {
        "type": "integer",
        "minimum": 0,
        "maximum": model.settings.max_logprobs,
    }
    properties["echo"] = FLAG
    properties["messages"] = {"type": "null", "description": "v1/chat/completions takes them"}
    return _object(properties, [], others=True)


def _chat(model: ServedModel) -> Schema:
    default_new_tokens = min(model.settings.default_new_tokens, model.generator.n_ctx // 2)
    properties = _shared(model, OPENAI_SAMPLING, default_new_tokens) | _openai(model)
    part = _object({"type": {"const": "text"}, "text": TEXT}, ["text"], others=True)
    content = {"anyOf": [TEXT, _list(part, 1)]}
    roles = {"enum": list(SPEAKERS)}
    message = _object({"role": roles, "content": content}, ["role", "content"], others=True)
    silent = {"role": {"const": "assistant"}, "content": {"enum": [None, []]}}
    ignored = _object(silent, ["role"], others=True)
    properties["messages"] = _list({"anyOf": [message, ignored]}, 1, MOST_TURNS)
    properties["logprobs"] = FLAG
    properties["top_logprobs"] = {
        "type": "integer",
        "minimum": 0,
        "maximum": model.settings.max_logprobs,
        "default": 0,
    }
    return _object(properties, ["messages"], others=True)


def _shared(
    model: ServedModel,
    defaults: Sampling,
    default_new_tokens: int,
    candidates: int = 1,
    longest: int = LARGEST_LENGTH,
) -> Schema:
    """The settings of every route; `longest` is the largest length that can be asked for."""
    settings = model.settings
    most_candidates = min(settings.max_candidates, model.generator.engine.slots)
    properties = {}
    for name in SETTINGS:
        if name != "max_new_tokens":
            properties[name] = _declared(name, getattr(defaults, name))
    for name in LENGTH_NAMES:
        properties[name] = {
            "type": "integer",
            "minimum": 0,
            "maximum": longest,
            "default": default_new_tokens,
            "description": SETTINGS["max_new_tokens"].metadata["help"],
            "x-setting": "max_new_tokens",
        }
    for name in CANDIDATES_NAMES:
        properties[name] = {
            "type": "integer",
            "minimum": 1,
            "maximum": most_candidates,
            "default": min(candidates, most_candidates),
            "description": "candidates; one if they are streamed in the original's API",
            "x-setting": "n",
        }
    properties["logit_bias"] = {
        "type": "object",
        "propertyNames": {"pattern": f"^({TOKEN_ID})$", "x-maximum": _vocab_size(model) - 1},
        "additionalProperties": NUMBER | {"minimum": -LARGEST_BIAS, "maximum": LARGEST_BIAS},
        "maxProperties": settings.max_biases,
        "default": {},
    }
    properties["seed"] = {"type": "integer", "minimum": -(1 << 63), "maximum": (1 << 63) - 1}
    properties["stop"] = _words(settings.max_stops)
    properties["bad_words"] = _words(settings.max_bad_words)
    properties["stream"] = FLAG
    return properties


def _openai(model: ServedModel) -> Schema:
    """What both of OpenAI's routes have beyond the original's API, or otherwise."""
    properties: Schema = {
        "model": {"const": model.name},
        "stream_options": _object({"include_usage": _nullable(FLAG)}, [], others=True),
    }
    properties |= {name: ANYTHING for name in IGNORED}
    for name, unavailable in UNAVAILABLE.items():
        properties[name] = {"enum": [*unavailable.neutral, None]}
    return properties


def _declared(name: str, default: float) -> Schema:
    """A setting as `sampling.SETTINGS` declares it."""
    declared = SETTINGS[name]
    kind, high = "number", declared.metadata["high"]
    if declared.type is int:
        kind = "integer"
    if high == inf:
        high = LARGEST_INTEGER
    return {
        "type": kind,
        "minimum": declared.metadata["low"],
        "maximum": high,
        "default": default,
        "description": declared.metadata["help"],
    }


def _words(longest: int) -> Schema:
    word = {"type": "string", "minLength": 1, "maxLength": MAX_WORD_CHARS}
    return {"anyOf": [word, _list(word, 0, longest)], "default": []}


def _vocab_size(model: ServedModel) -> int:
    return model.generator.tokenizer.vocab_size


# --- answers


def _list(items: Schema, fewest: int = 0, most: int | None = None) -> Schema:
    schema: Schema = {"type": "array", "items": items, "minItems": fewest}
    if most is not None:
        schema["maxItems"] = most
    return schema


def _object(properties: Schema, required: list[str] | None = None, others: bool = False) -> Schema:
    """An object with these keys; all are required unless it is said which are.

    `others`: it may have other keys too.
    """
    if required is None:
        required = list(properties)
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": others,
    }


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_FINISH_REASON: Schema = {"enum": ["stop", "length"]}
_USAGE = _object({"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT})
_MODEL = _object({"id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT})


def _choices(content: Schema) -> Schema:
    logprobs = _nullable({"type": "object"})
    keys = {"index": COUNT, "finish_reason": _FINISH_REASON, "logprobs": logprobs}
    return _list(_object(keys | content), 1)


def _openai_answer(kind: str, content: Schema) -> Schema:
    return _object(
        {
            "id": TEXT,
            "object": {"const": kind},
            "created": COUNT,
            "model": TEXT,
            "choices": _choices(content),
            "usage": _USAGE,
        }
    )


ANSWERS: Schema = {
    "Error": _object(
        {
            "error": _object(
                {
                    "message": TEXT,
                    "type": {"enum": ["invalid_request_error", "server_error"]},
                    "param": _nullable(TEXT),
                    "code": _nullable(TEXT),
                }
            )
        }
    ),
    "TorchServeError": _object({"code": COUNT, "type": TEXT, "message": TEXT}),
    "Model": _MODEL,
    "ModelList": _object({"object": {"const": "list"}, "data": _list(_MODEL, 1)}),
    "Description": {"type": "object", "required": ["openapi", "paths"]},
    "OriginalAnswer": _object(
        {
            "response": TEXT,
            "request": {"type": "object"},
            "model_info": _object(
                {
                    "model": TEXT,
                    "output": _list(TEXT, 1),
                    "finish_reason": _list(_FINISH_REASON, 1),
                    "prompt_tokens": COUNT,
                    "seed": {"type": "integer"},
                    "completion_tokens": _list(COUNT, 1),
                    "seconds": NUMBER,
                    "first_token_seconds": NUMBER,
                }
            ),
        }
    ),
    "Completion": _openai_answer("text_completion", {"text": TEXT}),
    "ChatCompletion": _openai_answer(
        "chat.completion", {"message": _object({"role": {"const": "assistant"}, "content": TEXT})}
    ),
}

_ERRORS: Schema = {
    "4XX": {
        "description": "what is wrong with the request; TorchServe's own shape where it never "
        "came as far as the model",
        "content": {
            JSON_TYPE: {"schema": {"anyOf": [reference("Error"), reference("TorchServeError")]}}
        },
    },
    "413": {"description": "the body is larger than max_request_size; this answer has no body"},
    "500": {
        "description": "TorchServe's own answer to a form that it cannot decode; any other form is "
        "a 415",
        "content": {JSON_TYPE: {"schema": reference("TorchServeError")}},
    },
    "503": {
        "description": "the queue is full, or the server is stopping or restarting: try later",
        "content": {JSON_TYPE: {"schema": reference("Error")}},
    },
}


def _post(request: str, answer: str) -> Schema:
    stream = {"description": "with stream: events, the last one [DONE]", "type": "string"}
    return {
        "requestBody": {"required": True, "content": {JSON_TYPE: {"schema": reference(request)}}},
        "responses": _ERRORS
        | {
            "200": {
                "description": "the answer",
                "content": {
                    JSON_TYPE: {"schema": reference(answer)},
                    "text/event-stream": {"schema": stream},
                },
            }
        },
    }


def _get(answer: str, description: str) -> Schema:
    content = {JSON_TYPE: {"schema": reference(answer)}}
    return {"responses": _ERRORS | {"200": {"description": description, "content": content}}}


def _page() -> Schema:
    content = {"text/html": {"schema": TEXT}}
    return {"responses": {"200": {"description": "the chat page", "content": content}}}

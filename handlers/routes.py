"""The server's routes, the bound on the size of answers, and the OpenAPI description.

POST goes to one of APIS. GET gets a `Page` that is ready when the server starts. msgspec makes the
description's schemas from the declarations, so ranges and defaults are the running server's.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from handlers.answers import EVENTS, JSON, Error, Generation, Page, to_json
from handlers.body import Refusal, check, parse
from handlers.openai import Chat, Completions, OpenAIRequest
from handlers.original import Original
from handlers.served_model import ServedModel
from handlers.unread import UNAVAILABLE

APIS: tuple[type[Original | Completions | Chat], ...] = (Original, Completions, Chat)
HTML = "text/html; charset=utf-8"

# Bytes of JSON. Java holds an answer that a client does not read until the connection ends. Without
# memory it drops its worker.
LARGEST_ANSWER = 8 * 2**20
LIVE_ANSWERS = 128 * 2**20  # of all requests that are being answered
JAVA_MEMORY = 2**30  # resident; jvm.options allows as much direct memory
SMALL_ANSWER = 2**16  # is never refused

NOTES = (
    "A key with the value null counts as not given. The original's API refuses any other unknown "
    "key; on OpenAI's paths one is ignored. Of the keys that share an x-setting the original's API "
    "wants one at most; on OpenAI's paths the first one counts. There a length that does not fit "
    "is cut down; in the original's API it can still be refused where the context has no room."
)


class Model(Struct):
    """A model, as OpenAI's clients list it."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "gptchat"


class ModelList(Struct):
    """The one model that is served here."""

    data: list[Model]
    object: Literal["list"] = "list"


class TorchServeError(Struct):
    """TorchServe's own answer to a request that never came as far as the model."""

    code: int
    type: str
    message: str


class Routes:
    """Everything that one model answers, by path: what follows /predictions/NAME/1.0/."""

    def __init__(self, model: ServedModel, page: str):
        self.model = model
        self.apis = {api.path: (api, api.declare(model)) for api in APIS}
        itself = Model(model.name)
        self.pages = {
            "v1/models": Page(JSON, to_json(ModelList([itself]))),
            f"v1/models/{model.name}": Page(JSON, to_json(itself)),
            "v1/openapi.json": Page(JSON, to_json(describe(model))),
        }
        if model.chats:
            self.pages[""] = Page(HTML, page)

    def get(self, path: str) -> Page:
        """The answer to a request without a body. Raises Refusal."""
        if path in self.pages:
            return self.pages[path]
        if path in self.apis:
            raise Refusal("the body is empty; wanted a JSON object, by POST")
        if path.startswith("v1/models/"):
            message = f"no such model: this is {self.model.name}"
            raise Refusal(message, 404, "model", "model_not_found")
        raise self._no_path(path)

    def post(self, path: str, body: Any, id: str, live: Iterable[Generation]) -> Generation:
        """What is to be generated for a request beside the `live` ones. Raises Refusal."""
        values = parse(body)
        if path not in self.apis:
            raise self._no_path(path)
        api, request = self.apis[path]
        name = values.get("model", self.model.name)
        if issubclass(request, OpenAIRequest) and name != self.model.name:
            message = f"no model {name!r:.60}: this is {self.model.name}"
            raise Refusal(message, 404, "model", "model_not_found")
        if api is Chat and not self.model.chats:
            message = f"{self.model.name} continues texts and does not chat: use v1/completions"
            raise Refusal(message)
        generation = api(self.model, id, check(request, values), values)
        check_size(generation, live)
        return generation

    def _no_path(self, path: str) -> Refusal:
        paths = [path for path in [*self.apis, *self.pages] if path]
        return Refusal(f"no such path: {path[:60]!r}; wanted one of {', '.join(paths)}", 404)


# --- the size of answers


def check_size(generation: Generation, live: Iterable[Generation]) -> None:
    """Raise Refusal for an answer that could become too large, alone or with what Java holds."""
    own = answer_bytes(generation)
    if own > LARGEST_ANSWER:
        message = f"the answer could have {own / 2**20:.1f} MB, wanted at most"
        message += f" {LARGEST_ANSWER >> 20} MB: fewer prompts, tokens or log-probabilities"
        raise Refusal(message)
    if own <= SMALL_ANSWER:
        return
    together = own + sum(map(answer_bytes, live))
    if together > LIVE_ANSWERS or java_bytes() + own > JAVA_MEMORY:
        raise Refusal("the server holds too many large answers; try later", 503)


def answer_bytes(generation: Generation) -> int:
    """The largest size of an answer's JSON, unless tokens are unusually long."""
    text, event, logprob = 16, 320, 100  # bytes: of a token, what is around it, its logprob
    per_token = text
    if generation.logprobs is not None:
        per_token += (1 + generation.logprobs) * logprob
    n_new = sum(request.sampling.max_new_tokens for request in generation.requests)
    n_echoed = generation.n_prompt_tokens if generation.echoes else 0
    per_candidate = (n_new + n_echoed) * per_token
    if generation.asked.stream:
        per_candidate += n_new * event
    return generation.frame_bytes + generation.n * per_candidate


def java_bytes() -> int:
    """Resident memory of Java, this process's parent; 0 if /proc does not have it."""
    try:
        pages = Path(f"/proc/{os.getppid()}/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


# --- the description


def describe(model: ServedModel) -> dict[str, Any]:
    """The OpenAPI description of one model's API, as JSON values."""
    apis = [api for api in APIS if model.chats or api is not Chat]
    requests = {api: api.declare(model) for api in apis}
    types = [*requests.values(), *(api.whole_answer for api in apis), *(api.chunk for api in apis)]
    types += [Model, ModelList, Error, TorchServeError]
    references, schemas = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    reference = dict(zip(types, references, strict=True))
    for request in requests.values():
        if issubclass(request, OpenAIRequest):
            properties = schemas[request.__name__]["properties"]
            properties["model"] = {"const": model.name}
            for name, unavailable in UNAVAILABLE.items():
                properties[name] = {"enum": [*unavailable.neutral, None]}

    any_error = {"anyOf": [reference[Error], reference[TorchServeError]]}
    errors = {
        "4XX": _response("what is wrong with the request", {JSON: any_error}),
        "413": {"description": "the body is larger than max_request_size; it has no body"},
        "500": _response(
            "TorchServe's own answer to a form that it cannot decode", {JSON: any_error}
        ),
        "503": _response(
            "the server is full, stopping or restarting: try later", {JSON: any_error}
        ),
    }
    root = f"/predictions/{model.name}"
    paths: dict[str, Any] = {}
    for api, request in requests.items():
        answer = _response("the answer", {JSON: reference[api.whole_answer]})
        events = {"schema": {"type": "string"}, "x-event": reference[api.chunk]}
        answer["content"][EVENTS] = events
        paths[f"{root}/1.0/{api.path}" if api.path else root] = {
            "post": {
                "summary": (api.__doc__ or "").partition("\n")[0],
                "requestBody": {
                    "required": True,
                    "content": {JSON: {"schema": reference[request]}},
                },
                "responses": errors | {"200": answer},
            }
        }
    pages = {
        "v1/models": reference[ModelList],
        f"v1/models/{model.name}": reference[Model],
        "v1/openapi.json": {"type": "object"},
    }
    for path, schema in pages.items():
        responses = errors | {"200": _response(path, {JSON: schema})}
        paths[f"{root}/1.0/{path}"] = {"get": {"responses": responses}}
    if model.chats:
        page = _response("the chat page", {"text/html": {"type": "string"}})
        paths[root]["get"] = {"responses": {"200": page}}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"gptchat: {model.name}", "version": "1.0.0", "description": NOTES},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _response(description: str, schemas: dict[str, Any]) -> dict[str, Any]:
    content = {kind: {"schema": schema} for kind, schema in schemas.items()}
    return {"description": description, "content": content}

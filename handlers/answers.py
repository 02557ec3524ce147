"""What the engine says of a job -> what its client reads: one JSON object at the end, or events on the way."""

import json
import time
from typing import Any

from gptchat.inference.engine import Output
from gptchat.inference.sampling import Scored
from gptchat.inference.text import StreamDecoder
from handlers.jobs import Job, Refusal, Served

JSON, EVENTS = "application/json", "text/event-stream"
NAMES = {
    "completions": (
        "cmpl",
        "text_completion",
        "text_completion",
    ),  # prefix of the id; object, whole and streamed
    "chat": ("chatcmpl", "chat.completion", "chat.completion.chunk"),
}


class Choice:
    """One candidate on its way: its text and log-probabilities, and how much of both has been sent."""

    def __init__(self, served: Served, job: Job, index: int):
        self.index, self.decoder = index, StreamDecoder(served.tokenizer, job.stop)
        self.text = served.tokenizer.decode(job.prompts[index // job.n][0]) if job.echo else ""
        self.text += "".join(self.decoder.push(id) for id in job.beginning)
        self.scored: list[tuple[int, Scored]] = []  # each token's place in the text
        self.tokens, self.sent, self.scored_sent, self.reason = 0, 0, 0, ""

    def take(self, output: Output) -> bool:
        """Add an output; true if a stop string just ended the candidate, which the engine cannot know."""
        if self.reason:
            return False
        if output.token is not None:
            self.tokens += 1
            self.scored.append((len(self.text), Scored(output.token, output.logprob, output.top)))
            self.text += self.decoder.push(output.token)
        if output.finish_reason or self.decoder.stopped:
            self.text += self.decoder.finish()
            self.reason = "stop" if self.decoder.stopped else str(output.finish_reason)
        return self.decoder.stopped and not output.finish_reason


class Answer:
    """One HTTP request from its arrival to its last chunk. `page` is a whole answer (content type, text) to a GET."""

    def __init__(self, served: Served, id: str):
        self.served, self.id, self.created, self.began = (
            served,
            id,
            int(time.time()),
            time.monotonic(),
        )
        self.job: Job = None  # type: ignore[assignment]  # until `begin`
        self.page: tuple[str, str] | None = None
        self.error: Refusal | None = None
        self.choices: list[Choice] = []
        self.first_token, self.seen, self.status, self.content_type = 0.0, False, 200, JSON

    def begin(self, job: Job) -> None:
        self.job = job
        self.choices = [
            Choice(self.served, job, index) for index in range(len(job.prompts) * job.n)
        ]

    @property
    def done(self) -> bool:
        return self.error is not None or all(choice.reason for choice in self.choices)

    @property
    def usage(self) -> dict[str, int]:
        prompt = sum(len(ids) for ids, _ in self.job.prompts) if self.job else 0
        new = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def take(self, place: int, output: Output) -> bool:
        """Add an output for the prompt at `place`; true as `Choice.take`."""
        choices = self.choices[place * self.job.n : (place + 1) * self.job.n]
        decoder, at = StreamDecoder(self.served.tokenizer), 0
        for scored in output.prompt_logprobs or ():
            for choice in choices:
                choice.scored.append((at, scored))
            at += len(decoder.push(scored.token))
        if output.token is not None and not self.first_token:
            self.first_token = time.monotonic()
        return choices[output.candidate].take(output)

    def drain(self) -> str:
        """What is to be sent now, "" for nothing; the first time it settles status and content type."""
        first, self.seen = not self.seen, True
        streams = self.job and self.job.stream and not (first and self.error)
        if first:
            self.status = self.error.status if self.error else 200
            self.content_type = self.page[0] if self.page else EVENTS if streams else JSON
        if streams:
            return (
                "".join(f"data: {json.dumps(event)}\n\n" for event in self.events())
                + "data: [DONE]\n\n" * self.done
            )
        if self.page or not self.done:
            return self.page[1] if self.page else ""
        return json.dumps(error_body(self.error) if self.error else self.whole())

    def events(self) -> list[Any]:
        if self.error:
            return [error_body(self.error)]
        events, original = [], self.job.kind == "original"
        for choice in self.choices:
            text, scored = choice.text[choice.sent :], choice.scored[choice.scored_sent :]
            if text or choice.reason and choice.sent <= len(choice.text):
                events.append(
                    {"token": text}
                    if original
                    else self.frame([self.shape(choice, text, scored, "delta")])
                )
                choice.sent, choice.scored_sent = (
                    len(choice.text) + bool(choice.reason),
                    len(choice.scored),
                )
        if self.done and (original or self.job.usage):
            events.append(self.whole() if original else self.frame([]) | {"usage": self.usage})
        return events

    def whole(self) -> Any:
        if self.job.kind != "original":
            choices = [
                self.shape(choice, choice.text, choice.scored, "message") for choice in self.choices
            ]
            return self.frame(choices, streamed=False) | {"usage": self.usage}
        texts, now = [choice.text for choice in self.choices], time.monotonic()
        return {
            "response": sorted(texts, key=len)[len(texts) // 2],
            "request": self.job.request,
            "model_info": {
                "model": self.served.name,
                "output": texts,
                "finish_reason": [choice.reason for choice in self.choices],
                "prompt_tokens": self.usage["prompt_tokens"],
                "seed": self.job.sampling.seed,
                "completion_tokens": [choice.tokens for choice in self.choices],
                "seconds": round(now - self.began, 4),
                "first_token_seconds": round((self.first_token or now) - self.began, 4),
            },
        }

    def frame(self, choices: list[Any], streamed: bool = True) -> dict[str, Any]:
        prefix, *objects = NAMES[self.job.kind]
        frame = {"id": f"{prefix}-{self.id}", "object": objects[streamed], "created": self.created}
        return (
            frame
            | {"model": self.served.name, "choices": choices}
            | ({"usage": None} if self.job.usage else {})
        )

    def shape(
        self, choice: Choice, text: str, scored: list[tuple[int, Scored]], key: str
    ) -> dict[str, Any]:
        """A choice as its API has it; `key` is delta or message."""
        role = {"role": "assistant"} if not choice.sent else {}
        said = {key: role | {"content": text}} if self.job.kind == "chat" else {"text": text}
        logprobs = None if self.job.sampling.logprobs is None else self.logprobs(scored)
        return {
            "index": choice.index,
            **said,
            "finish_reason": choice.reason or None,
            "logprobs": logprobs,
        }

    def logprobs(self, entries: list[tuple[int, Scored]]) -> dict[str, Any]:
        if self.job.kind == "chat":
            return {
                "content": [
                    self.token(scored.token, scored.logprob)
                    | {"top_logprobs": [self.token(*best) for best in scored.top]}
                    for _, scored in entries
                ]
            }
        tops = [
            (*scored.top, (scored.token, scored.logprob)) for _, scored in entries
        ]  # the drawn one too
        return {
            "tokens": [self.name(scored.token) for _, scored in entries],
            "text_offset": [at for at, _ in entries],
            "token_logprobs": [scored.logprob for _, scored in entries],
            "top_logprobs": [
                None if top[-1][1] is None else {self.name(id): p for id, p in top} for top in tops
            ],
        }

    def token(self, id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self.name(id),
            "logprob": logprob,
            "bytes": list(self.served.tokenizer.token_bytes[id]),
        }

    def name(self, id: int) -> str:
        """Different for each token: text, `bytes:\\xe3` for part of a character, `[SEP]` or such for a special one."""
        raw = self.served.tokenizer.token_bytes[id]
        try:
            return raw.decode() or str(self.served.tokenizer.backend.id_to_token(id))
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def error_body(refusal: Refusal) -> dict[str, Any]:
    """OpenAI's shape, for every API."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    return {
        "error": {
            "message": refusal.message,
            "type": kind,
            "param": refusal.param,
            "code": refusal.code,
        }
    }


def models(served: Served, path: str) -> dict[str, Any]:
    """The answer to GET v1/models and v1/models/NAME."""
    model = {"id": served.name, "object": "model", "created": 0, "owned_by": "gptchat"}
    if path not in ("v1/models", f"v1/models/{served.name}"):
        raise Refusal(f"no such model: this is {served.name}", 404, "model", "model_not_found")
    return model if path.endswith(served.name) else {"object": "list", "data": [model]}

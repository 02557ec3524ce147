"""What the engine says of a job -> what its client reads: one JSON object at the end, or server-sent events on the way."""

import json
import time
from typing import Any

from gptchat.engine import Output
from gptchat.sampling import Scored
from gptchat.tokenizer import StreamDecoder, Tokenizer
from handlers.jobs import Job, Refusal, Served

NAMES = {"completions": ("cmpl", "text_completion", "text_completion"),  # prefix of the id; object, whole and streamed
         "chat": ("chatcmpl", "chat.completion", "chat.completion.chunk")}


class Choice:
    """One candidate on its way: its text and log-probabilities, and how much of both has been sent."""

    def __init__(self, served: Served, job: Job, index: int):
        prompt = job.prompts[index // job.n]
        self.index, self.decoder = index, StreamDecoder(served.tokenizer, job.stop)
        self.text = served.tokenizer.decode(prompt.input_ids) if job.echo else ""
        self.text += "".join(self.decoder.push(id) for id in prompt.beginning)
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

    def piece(self) -> tuple[str, list[tuple[int, Scored]]]:
        """The text and scored tokens since the last piece."""
        text, scored = self.text[self.sent :], self.scored[self.scored_sent :]
        self.sent, self.scored_sent = len(self.text) + bool(self.reason), len(self.scored)  # past the end: all is said
        return text, scored


class Answer:
    """One HTTP request between its first chunk and its last."""

    def __init__(self, served: Served, job: Job, id: str):
        self.served, self.job, self.id = served, job, id
        self.created, self.began, self.first_token, self.opened = int(time.time()), time.monotonic(), 0.0, False
        self.seen = False  # by a round to the client
        self.choices = [Choice(served, job, index) for index in range(len(job.prompts) * job.n)]
        self.error: Refusal | None = None

    @property
    def done(self) -> bool:
        return self.error is not None or all(choice.reason for choice in self.choices)

    @property
    def usage(self) -> dict[str, int]:
        prompt = sum(len(prompt.input_ids) for prompt in self.job.prompts)
        new = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def take(self, place: int, output: Output) -> bool:
        """Add an output for the prompt at `place`; true as `Choice.take`."""
        choices = self.choices[place * self.job.n : (place + 1) * self.job.n]
        if output.prompt_logprobs:
            decoder, at = StreamDecoder(self.served.tokenizer), 0
            for scored in output.prompt_logprobs:
                for choice in choices:
                    choice.scored.append((at, scored))
                at += len(decoder.push(scored.token))
        if output.token is not None and not self.first_token:
            self.first_token = time.monotonic()
        return choices[output.candidate].take(output)

    def drain(self) -> str:
        """What is to be sent now; "" for nothing. Of a whole answer nothing is sent before its end."""
        if not self.job.stream:
            return json.dumps(error_body(self.error) if self.error else self.whole()) if self.done else ""
        events = self.opening() + [self.chunk(choice) for choice in self.choices if choice.sent < len(choice.text) + bool(choice.reason)]
        if self.error:
            events = [error_body(self.error)]
        elif self.done:
            events += self.closing()
        return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n" * self.done

    def opening(self) -> list[Any]:
        if self.opened or self.job.kind != "chat":
            return []
        self.opened = True
        return [self.frame([self.message(choice, {"role": "assistant", "content": ""}, []) for choice in self.choices], True)]

    def chunk(self, choice: Choice) -> Any:
        text, scored = choice.piece()
        if self.job.kind == "original":
            return {"token": text}
        return self.frame([self.message(choice, {"content": text} if text else {}, scored, True)], True)

    def closing(self) -> list[Any]:
        if self.job.kind == "original":
            return [self.whole()]
        return [self.frame([], True) | {"usage": self.usage}] if self.job.usage else []

    def whole(self) -> Any:
        if self.job.kind == "original":
            return self.original()
        choices = [self.message(choice, {"role": "assistant", "content": choice.text, "refusal": None}, choice.scored, False)
                   for choice in self.choices]
        return self.frame(choices, False) | {"usage": self.usage}

    def original(self) -> Any:
        """The original's answer; its rule for the response is the candidate of median length."""
        texts, now = [choice.text for choice in self.choices], time.monotonic()
        return {"response": sorted(texts, key=len)[len(texts) // 2], "request": self.job.request, "model_info": {
            "model": self.served.name, "output": texts, "finish_reason": [choice.reason for choice in self.choices],
            "prompt_tokens": self.usage["prompt_tokens"], "completion_tokens": [choice.tokens for choice in self.choices],
            "seed": self.job.sampling.seed, "first_token_seconds": round((self.first_token or now) - self.began, 4),
            "seconds": round(now - self.began, 4)}}

    def frame(self, choices: list[Any], streamed: bool) -> dict[str, Any]:
        prefix, *objects = NAMES[self.job.kind]
        return {"id": f"{prefix}-{self.id}", "object": objects[streamed], "created": self.created, "model": self.served.name,
                "choices": choices} | ({"usage": None} if streamed and self.job.usage else {})

    def message(self, choice: Choice, content: dict[str, Any], scored: list[tuple[int, Scored]], streamed: bool = True) -> Any:
        """A choice in the shape of its API."""
        text = {"delta" if streamed else "message": content} if self.job.kind == "chat" else {"text": content.get("content", "")}
        return {"index": choice.index, **text, "finish_reason": choice.reason or None, "logprobs": self.logprobs(scored)}

    def logprobs(self, entries: list[tuple[int, Scored]]) -> Any:
        if self.job.sampling.logprobs is None:
            return None
        if self.job.kind == "chat":
            return {"content": [self.token(scored.token, scored.logprob) | {
                "top_logprobs": [self.token(*best) for best in scored.top]} for _, scored in entries], "refusal": None}
        name = self.served.tokenizer
        return {"tokens": [token_name(name, scored.token) for _, scored in entries],
                "token_logprobs": [scored.logprob for _, scored in entries],
                "top_logprobs": [scored.logprob and {token_name(name, id): logprob for id, logprob in (
                    *scored.top, (scored.token, scored.logprob))} for _, scored in entries],
                "text_offset": [at for at, _ in entries]}

    def token(self, id: int, logprob: float | None) -> dict[str, Any]:
        tokenizer = self.served.tokenizer
        return {"token": token_name(tokenizer, id), "logprob": logprob, "bytes": list(tokenizer.token_bytes[id])}


def token_name(tokenizer: Tokenizer, id: int) -> str:
    """Different for each token: its text, `bytes:\\xe3` for a part of a character, `[SEP]` or such for a special one."""
    raw = tokenizer.token_bytes[id]
    try:
        return raw.decode() or str(tokenizer.backend.id_to_token(id))
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def error_body(refusal: Refusal) -> dict[str, Any]:
    """OpenAI's shape, for every API."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}}


def models(served: Served, path: str) -> dict[str, Any]:
    """The answer to GET v1/models and v1/models/NAME."""
    model = {"id": served.name, "object": "model", "created": served.created, "owned_by": "gptchat"}
    if path not in ("v1/models", f"v1/models/{served.name}"):
        raise Refusal(f"no such model: this is {served.name}", 404, "model", "model_not_found")
    return model if path.endswith(served.name) else {"object": "list", "data": [model]}

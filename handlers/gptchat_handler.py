"""TorchServe's side of the server, in the one class that it demands.

TorchServe (continuous batching) calls `handle` again and again with every live request; a body comes with the first
call only. Each call takes in who is new, drops who left, waits until the decode thread has something, and answers
everyone. Nothing is ever raised out of it: that would end every live request.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from ts.metrics.metric_type_enum import MetricTypes

from gptchat.inference.engine import Engine, Output, Request, generate
from gptchat.model import pretrained
from gptchat.runtime import tune_memory
from handlers.answers import JSON, Answer, models
from handlers.jobs import Reader, Refusal, Served
from handlers.loop import DecodeLoop

log = logging.getLogger("gptchat")


class GptchatHandler:
    """Serves the model directory `model` in the archive's folder."""

    def initialize(self, context: Any) -> None:
        folder, settings = (
            Path(context.system_properties["model_dir"]),
            context.model_yaml_config["gptchat"],
        )
        self.served, engine = load(
            folder / "model", context.model_name, SimpleNamespace(**settings)
        )
        self.page = (folder / "handlers" / "page.html").read_text(encoding="utf-8")
        self.draining = (
            Path(os.environ.get("GPTCHAT_RUN", folder)) / "draining"
        )  # the launcher's sign
        self.metrics, self.loop = context.metrics, DecodeLoop(engine)
        self.live: dict[str, Answer] = {}
        self.owners: dict[
            int, tuple[str, int]
        ] = {}  # the engine's requests: of which of ours, and which prompt there
        self.told: tuple[int, ...] = ()
        self.loop.start()
        quiet_logging()
        self.gauge()

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        """One result per request, in order; "" where there is nothing to send yet."""
        ids = [context.request_ids[i] for i in range(len(data))]
        gone, new = (
            set(self.live) - set(ids),
            [i for i, id in enumerate(ids) if id not in self.live],
        )
        for i in new:
            self.live[ids[i]] = Answer(self.served, ids[i])
            self.guarded(ids[i], self.open, data[i], context.get_all_request_header(i))
        if gone or new:
            with self.loop.at_rest() as engine:
                for id in gone:
                    self.finish(id, "left")
                for i in new:
                    self.guarded(ids[i], self.submit, engine)
        # with nothing to send a newcomer waits 10 ms to be seen
        for output in self.loop.collect(
            0 if any(answer.done for answer in self.live.values()) else 0.01
        ):
            id, place = self.owners.get(output.request_id, ("", 0))
            self.guarded(id, self.take, place, output)
        if self.loop.failure and self.live:
            for answer in self.live.values():
                answer.error = answer.error or Refusal(
                    "the decoder failed and is restarted: try again", 500
                )
            threading.Timer(
                0.5, os._exit, (1,)
            ).start()  # once everyone has been answered; TorchServe restarts us
        chunks = [self.send(i, id, context) for i, id in enumerate(ids)]
        self.gauge()
        return chunks

    def guarded(self, id: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """Do something for a request; what goes wrong is its own error alone."""
        if not (answer := self.live.get(id)):
            return None
        try:
            return action(answer, *arguments)
        except Refusal as refusal:
            answer.error = refusal
        except Exception:
            log.exception("request %s failed", id)
            answer.error = Refusal("internal error", 500)

    def open(self, answer: Answer, data: dict[str, Any], headers: dict[str, Any]) -> None:
        """Read a request and hand it to the engine, or answer it at once."""
        path, body = str(headers.get("url_path", "")), data.get("body")
        kind = next(
            (str(value) for name, value in headers.items() if name.lower() == "content-type"),
            "missing",
        )
        if body in (b"", ""):
            answer.page = self.get(path)
        elif body is None or kind.partition(";")[0].strip().lower() != JSON:
            raise Refusal(f"the content type is {kind[:60]}, wanted {JSON}", 415)
        elif self.draining.exists() or self.loop.failure:
            raise Refusal("the server is stopping or restarting", 503)
        elif len(self.live) > (most := self.served.limits.max_requests):
            raise Refusal(
                f"the queue is full: {most} requests (max_requests) are being answered; try later",
                503,
            )
        else:
            answer.begin(Reader(body, self.served).read(path))

    def submit(self, answer: Answer, engine: Engine) -> None:
        if (job := answer.job) and not answer.error:
            scores, stop_ids = job.echo and job.sampling.logprobs is not None, [self.served.stop_id]
            for place, (ids, types) in enumerate(job.prompts):
                number = engine.submit(Request(ids, types, job.sampling, job.n, stop_ids, scores))
                self.owners[number] = answer.id, place
                self.loop.streaming_ids |= {number} if job.stream else set()

    def get(self, path: str) -> tuple[str, str]:
        """Content type and text of what has no body to ask for it."""
        if path.startswith("v1/models"):
            return JSON, json.dumps(models(self.served, path))
        if path or self.served.task != "chatlm":
            raise Refusal(
                'the body is empty; wanted JSON such as {"context": "some text"}',
                404 if path else 400,
            )
        return "text/html; charset=utf-8", self.page

    def take(self, answer: Answer, place: int, output: Output) -> None:
        if answer.take(place, output):
            with self.loop.at_rest() as engine:
                engine.cancel(output.request_id, output.candidate)

    def send(self, i: int, id: str, context: Any) -> str:
        """A request's next chunk, and in `context` what goes with it."""
        answer = self.live[id]
        first, text = not answer.seen, self.guarded(id, Answer.drain)
        text, done = (
            answer.drain() if text is None else text,
            answer.done,
        )  # an error can always be told
        context.set_response_status(answer.status, "", i)
        context.set_response_content_type(i, answer.content_type)
        context.stopping_criteria = [
            *(context.stopping_criteria or [])[:i],
            lambda _: None if first and done else done,
        ]
        if done:
            self.finish(
                id, "error" if answer.error and answer.status == 200 else str(answer.status)
            )
        return text

    def finish(self, id: str, result: str) -> None:
        """Forget a request, free its slots, and tell of it: figures, and one line without its text."""
        answer, now = self.live.pop(id), time.monotonic()
        for number in [number for number, (owner, _) in self.owners.items() if owner == id]:
            if result != "200":  # it may still be decoded
                with self.loop.at_rest() as engine:
                    engine.cancel(number)
            del self.owners[number]
            self.loop.streaming_ids.discard(number)
        kind, first, usage = (
            answer.job.kind if answer.job else "none",
            answer.first_token,
            answer.usage,
        )
        first_seconds, new = (first or now) - answer.began, usage["completion_tokens"]
        self.metric("requests", 1, kind, result)
        self.metric("prompt_tokens", usage["prompt_tokens"])
        self.metric("generated_tokens", new)
        if first:
            longest = max(choice.tokens for choice in answer.choices)
            self.metric("first_token_seconds", first_seconds, kind=MetricTypes.HISTOGRAM)
            self.metric("token_seconds", (now - first) / longest, kind=MetricTypes.HISTOGRAM)
        log.info(
            "%s %s %s %s: %d + %d tokens, first %.3f s, all %.3f s",
            id,
            self.served.name,
            kind,
            result,
            usage["prompt_tokens"],
            new,
            first_seconds,
            now - answer.began,
        )

    def metric(
        self, name: str, value: float, *labels: str, kind: MetricTypes = MetricTypes.COUNTER
    ) -> None:
        self.metrics.get_metric(f"gptchat_{name}", kind).add_or_update(
            value, [self.served.name, *labels]
        )

    def gauge(self) -> None:
        """Tell how much there is to do, where that has changed."""
        if self.told != (now := (len(self.live), *self.loop.load)):
            self.told = now
            for name, value in zip(("live_requests", "live_slots", "queued"), now, strict=True):
                self.metric(name, value, kind=MetricTypes.GAUGE)


def load(directory: Path, name: str, limits: Any) -> tuple[Served, Engine]:
    """The model and an engine that has run once; as many slots as cache_mb holds, at most limits.slots."""
    torch.set_num_threads(limits.threads or torch.get_num_threads())
    model, tokenizer, task = pretrained.load_model(
        directory, "cuda" if torch.cuda.is_available() else "cpu"
    )
    slot = (
        8 * model.config.n_layer * model.config.n_embd * model.config.n_positions
    )  # bytes, if the cache is float32
    limits.slots = max(1, min(limits.slots, limits.cache_mb * 2**20 // slot))
    never = pretrained.never_generated(model.config, tokenizer, task)
    engine = Engine(model, limits.slots, dtype=limits.dtype, suppress=never)
    generate(engine, [Request([tokenizer.eos_id], [1] if task == "chatlm" else None)])
    tune_memory()
    return Served(
        name, task, tokenizer, engine.length, limits, pretrained.stop_id(tokenizer, task)
    ), engine


def quiet_logging() -> None:
    """Lines per request, not per round, which cost a third of a round; none for what is only a client's mistake."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger().addFilter(
        lambda record: not record.getMessage().startswith("Failed json decoding")
    )
    metrics = logging.getLogger("ts.metrics.caching_metric")
    metrics.setLevel(logging.INFO)
    metrics.addFilter(lambda record: "PredictionTime" not in record.getMessage())
    log.setLevel(logging.INFO)

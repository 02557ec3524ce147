"""TorchServe's side of the server, in the one class that it demands.

TorchServe (continuous batching) calls `handle` again and again with every live request; a body comes with the first call
only. Each call takes in who is new, drops who left, waits until the decode thread has something, and answers everyone.
Nothing is ever raised out of it: that would end every live request.
"""

import json
import logging
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from ts.metrics.metric_type_enum import MetricTypes

from gptchat import pretrained
from gptchat.engine import Engine, Output, Request
from handlers import answers, jobs
from handlers.jobs import Refusal, Served
from handlers.loop import DecodeLoop, Ticket

PATIENCE = 0.01  # s that a newcomer may wait to be seen while there is nothing to send
JSON, EVENTS, HTML = "application/json", "text/event-stream", "text/html; charset=utf-8"
Reply = tuple[int, str, str]  # status, content type, body
log = logging.getLogger("gptchat")


class GptchatHandler:
    """Serves the model directory `model` in the archive's folder."""

    def initialize(self, context: Any) -> None:
        folder = Path(context.system_properties["model_dir"])
        limits = SimpleNamespace(**context.model_yaml_config["gptchat"])
        self.served, engine = load(folder / "model", context.model_name, limits)
        self.page = (folder / "handlers" / "page.html").read_text(encoding="utf-8")
        self.draining = Path(os.environ.get("GPTCHAT_RUN", folder), "draining")
        self.metrics = context.metrics
        self.live: dict[str, tuple[answers.Answer, list[Ticket]]] = {}
        self.loop = DecodeLoop(engine)
        self.loop.start()
        quiet_logging()

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        """One result per request, in order; "" where there is nothing to send yet."""
        context.stopping_criteria = [lambda _: None] * len(data)
        ids = [context.request_ids[i] for i in range(len(data))]
        try:
            for id in set(self.live) - set(ids):
                self.finish(id, "left")
            new = [i for i, id in enumerate(ids) if id not in self.live]
            replies = {i: reply for i in new if (reply := self.open(ids[i], data[i], context.get_all_request_header(i)))}
            for ticket, event in self.loop.collect(0 if replies else PATIENCE):
                self.take(ticket, event)
            return [self.send(i, replies.get(i) or self.drain(i, id, context), context) for i, id in enumerate(ids)]
        except Exception:
            log.exception("a round failed: every live request is given up")
            for id in [*self.live]:
                self.finish(id, "error")
            return [self.send(i, refused(Refusal("internal error", 500)), context) for i in range(len(ids))]

    def open(self, id: str, data: dict[str, Any], headers: dict[str, Any]) -> Reply | None:
        """Begin to answer a request; the whole reply if it can be given at once."""
        try:
            return self.read(id, data, headers)
        except Refusal as refusal:
            error = refusal
        except Exception:
            log.exception("a request could not be read")
            error = Refusal("internal error", 500)
        self.count("refused", error.status)
        log.info("%s %s refused %d", id, self.served.name, error.status)
        return refused(error)

    def read(self, id: str, data: dict[str, Any], headers: dict[str, Any]) -> Reply | None:
        path, body = str(headers.get("url_path", "")), data.get("body")
        types = [str(value) for name, value in headers.items() if name.lower() == "content-type"] or ["missing"]
        if body in (b"", ""):
            return self.get(path)
        if types[0].partition(";")[0].strip().lower() != JSON or body is None:
            raise Refusal(f"the content type is {types[0][:60]}, wanted {JSON}", 415)
        if isinstance(body, (bytes, bytearray)):
            try:
                body = json.loads(body)
            except (ValueError, RecursionError) as error:
                raise Refusal(f"the body is not JSON: {str(error)[:80]}") from None
        if self.draining.exists() or self.loop.failure:
            raise Refusal("the server is stopping or restarting", 503)
        if len(self.live) >= self.served.limits.max_requests:
            raise Refusal(f"the queue is full: {len(self.live)} requests are being answered; try again later", 503)
        job = jobs.parse(path, body, self.served)
        tickets = [Ticket(id, place, Request(
            prompt.input_ids, prompt.token_type_ids, job.sampling, job.n, [pretrained.stop_id(self.served.tokenizer, self.served.task)],
            score_prompt=job.echo and job.sampling.logprobs is not None), job.stream) for place, prompt in enumerate(job.prompts)]
        self.live[id] = answers.Answer(self.served, job, id), tickets
        for ticket in tickets:
            self.loop.submit(ticket)
        self.gauge()
        return None

    def get(self, path: str) -> Reply:
        if path.startswith("v1/models"):
            return 200, JSON, json.dumps(answers.models(self.served, path))
        if path == "" and self.served.task == "chatlm":
            return 200, HTML, self.page
        raise Refusal('the body is empty; wanted JSON such as {"context": "some text"}', 404 if path else 400)

    def take(self, ticket: Ticket, event: Output | ValueError) -> None:
        answer, _ = self.live.get(ticket.owner, (None, ()))
        if answer is None:
            return
        try:
            if isinstance(event, ValueError):
                raise Refusal(str(event))
            if answer.take(ticket.place, event):
                self.loop.cancel(ticket, event.candidate)
        except Refusal as refusal:
            answer.error = refusal
        except Exception:
            log.exception("an output could not be taken")
            answer.error = Refusal("internal error", 500)

    def drain(self, i: int, id: str, context: Any) -> Reply:
        """What a live request is sent now."""
        answer, _ = self.live[id]
        first, answer.seen = not answer.seen, True
        if self.loop.failure and not answer.done:
            answer.error = Refusal("the decoder failed and is restarted: try again", 500)
            threading.Timer(0.5, os._exit, (1,)).start()  # once everyone has been answered; TorchServe restarts us
        done, text = answer.done, answer.drain()
        if not (first and done):
            context.stopping_criteria[i] = lambda _: done
        if done:
            self.finish(id, "error" if answer.error else "200")
        if first and answer.error:
            return refused(answer.error)
        return 200, EVENTS if answer.job.stream else JSON, text

    def send(self, i: int, reply: Reply, context: Any) -> str:
        context.set_response_status(reply[0], "", i)
        context.set_response_content_type(i, reply[1])
        return reply[2]

    def finish(self, id: str, result: str) -> None:
        """Forget a request, free its slots, and tell of it: figures, and one line without its text."""
        answer, tickets = self.live.pop(id)
        for ticket in tickets:
            self.loop.cancel(ticket)
        now, first, usage = time.monotonic(), answer.first_token, answer.usage
        new = usage["completion_tokens"]
        self.count(answer.job.kind, result)
        self.metric("gptchat_prompt_tokens", usage["prompt_tokens"])
        self.metric("gptchat_generated_tokens", new)
        if first:
            self.metric("gptchat_first_token_seconds", first - answer.began, kind=MetricTypes.HISTOGRAM)
            longest = max(choice.tokens for choice in answer.choices)
            self.metric("gptchat_token_seconds", (now - first) / longest, kind=MetricTypes.HISTOGRAM)
        self.gauge()
        log.info("%s %s %s %s: %d + %d tokens, first after %.3f s, all after %.3f s", id, self.served.name, answer.job.kind, result,
                 usage["prompt_tokens"], new, (first or now) - answer.began, now - answer.began)

    def metric(self, name: str, value: float, *labels: str, kind: MetricTypes = MetricTypes.COUNTER) -> None:
        self.metrics.get_metric(name, kind).add_or_update(value, [self.served.name, *labels])

    def count(self, kind: str, result: object) -> None:
        self.metric("gptchat_requests", 1, kind, str(result))

    def gauge(self) -> None:
        engine = self.loop.engine
        for name, value in (("live_requests", len(self.live)), ("live_slots", engine.live), ("queued", engine.queued)):
            self.metric(f"gptchat_{name}", value, kind=MetricTypes.GAUGE)


def refused(refusal: Refusal) -> Reply:
    return refusal.status, JSON, json.dumps(answers.error_body(refusal))


def load(directory: Path, name: str, limits: Any) -> tuple[Served, Engine]:
    """The model and an engine that has run once; as many slots as cache_mb holds, at most limits.slots."""
    if limits.threads:
        torch.set_num_threads(limits.threads)
    dtype = getattr(torch, limits.dtype)
    model, tokenizer, task = pretrained.load(directory, "cuda" if torch.cuda.is_available() else "cpu", dtype)
    config = model.config
    slot = 2 * config.n_layer * config.n_embd * config.n_positions * dtype.itemsize  # bytes
    limits.slots = max(1, min(limits.slots, limits.cache_mb * 2**20 // slot))
    engine = Engine(model, limits.slots, dtype=limits.dtype, suppress=pretrained.never_generated(config, tokenizer, task))
    engine.submit(Request([tokenizer.eos_id], [1] if task == "chatlm" else None))
    while not engine.idle:
        engine.step()
    return Served(name, task, tokenizer, engine.length, limits, int(time.time())), engine


def quiet_logging() -> None:
    """Lines per request, not per round: TorchServe's own cost a third of a round."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger().addFilter(lambda record: not record.getMessage().startswith("Failed json decoding"))
    metrics = logging.getLogger("ts.metrics.caching_metric")
    metrics.setLevel(logging.INFO)
    metrics.addFilter(lambda record: "PredictionTime" not in record.getMessage())
    log.setLevel(logging.INFO)

"""The server's logic, without TorchServe: HTTP requests in, chunks of answers out, by rounds.

A round (`Service.round`) takes in new requests, drops those whose client has left, waits for the
decode thread, and returns one chunk, often empty, for every live request.

Invariants: `round` never raises, since TorchServe would end every live request; an error ends only
its own request. If the decode thread has died, the next round ends all requests with an error, and
then the process, which TorchServe restarts. Metrics and log hold no text of a request.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from gptchat.inference.engine import Output
from handlers.answers import JSON, Answer
from handlers.body import Refusal
from handlers.loop import DecodeLoop, Result, Ticket
from handlers.routes import Routes
from handlers.served_model import ServedModel

SECONDS_TO_ANSWER = 0.5  # before the process ends because the decode thread has died
GAUGES = ("live_requests", "live_slots", "queued")

# Called with each figure: kind (counter, gauge or histogram), name, value and labels.
Record = Callable[[str, str, float, list[str]], None]

log = logging.getLogger("gptchat")


class Arrival(NamedTuple):
    """A request as TorchServe gives it: `body` is parsed JSON, raw bytes, text, or None."""

    headers: Mapping[str, Any]
    body: Any

    def header(self, wanted: str, default: str) -> str:
        """A header by its name in lower case, however the client writes it."""
        for name, value in self.headers.items():
            if name.lower() == wanted:
                return str(value)
        return default


class Chunk(NamedTuple):
    """The next piece of an answer, with the status and content type of the first one."""

    text: str
    status: int
    content_type: str
    is_first: bool
    is_last: bool


def check_host(header: str, names: Collection[str]) -> None:
    """Raise Refusal if a Host header names neither one of `names` nor an IP address.

    This stops DNS rebinding: a page elsewhere whose name is made to point to this machine.
    """
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        name = ""
    if name in names:
        return
    try:
        ip_address(name)
    except ValueError:
        message = f"the Host header is {header!r:.60}; the setting `hosts` lists the names allowed"
        raise Refusal(message, 403) from None


class Service:
    """Answers requests with one model. While the file `draining` exists, it refuses new ones."""

    def __init__(
        self,
        model: ServedModel,
        page: str,
        draining: Path,
        record: Record,
        host: str = "localhost",  # where the API listens
    ):
        self.model = model
        self.routes = Routes(model, page)
        self.draining = draining
        self.hosts = {"localhost", host.lower(), *map(str.lower, model.settings.hosts)}
        self.record = record
        self.loop = DecodeLoop(model.generator.engine)
        self.live: dict[str, Answer] = {}  # by the request's id
        self.recorded_load: tuple[int, ...] = ()

    def start(self) -> None:
        self.loop.start()
        self._record_load()

    def round(self, ids: Sequence[str], arrivals: Mapping[str, Arrival]) -> list[Chunk]:
        """The next chunk of every live request, in the order of `ids`; `arrivals` are new."""
        for id in self.live.keys() - ids:
            self.finish(self.live[id], "left")
        for id, arrival in arrivals.items():
            self.live[id] = Answer(id)
            self._guarded(self.live[id], self.open, arrival)
        for id in arrivals:  # all together, so that the engine can prefill them together
            self.submit(self.live[id])
        answered = any(answer.done for answer in self.live.values())
        for result in self.loop.collect(hurry=answered):
            self._deliver(result)
        if self.loop.failure and self.live:
            self._fail_all()
        chunks = [self._next_chunk(self.live[id]) for id in ids]
        self._record_load()
        return chunks

    def _guarded(self, answer: Answer, action: Callable[..., Any], *arguments: Any) -> Any:
        """Do something for a request. If that fails, it gets an error, and this returns None."""
        try:
            return action(answer, *arguments)
        except Refusal as refusal:
            answer.error = refusal
        except Exception:
            log.exception("request %s failed", answer.id)
            answer.error = Refusal("internal error", 500)
        return None

    def open(self, answer: Answer, arrival: Arrival) -> None:
        path = str(arrival.headers.get("url_path", ""))
        check_host(arrival.header("host", "localhost"), self.hosts)
        if arrival.body in (b"", ""):
            answer.page = self.routes.get(path)
            return
        content_type = arrival.header("content-type", "missing")
        if content_type.partition(";")[0].strip().lower() != JSON:
            raise Refusal(f"the content type is {content_type[:60]}, wanted {JSON}", 415)
        encoding = arrival.header("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            raise Refusal(f"the content encoding is {encoding[:60]}, wanted none", 415)
        if self.draining.exists() or self.loop.failure:
            raise Refusal("the server is stopping or restarting", 503)
        most = self.model.settings.max_requests
        if len(self.live) > most:
            message = f"the queue is full: {most} requests (max_requests) are being answered"
            raise Refusal(f"{message}; try later", 503)
        live = [other.generation for other in self.live.values() if other.generation]
        answer.generation = self.routes.post(path, arrival.body, answer.id, live)

    def submit(self, answer: Answer) -> None:
        if answer.generation is None or answer.error:
            return
        for prompt, request in enumerate(answer.generation.requests):
            ticket = Ticket(request, answer.generation.asked.stream, answer, prompt)
            answer.tickets.append(ticket)
            self.loop.submit(ticket)

    def _deliver(self, result: Result) -> None:
        ticket, output = result
        answer: Answer = ticket.owner
        if self.live.get(answer.id) is answer:
            self._guarded(answer, self.take, ticket, output)

    def take(self, answer: Answer, ticket: Ticket, output: Any) -> None:
        """Add an output or a ranking of candidates to its answer."""
        if isinstance(output, Exception):
            raise output
        generation = answer.generation
        assert generation
        if not isinstance(output, Output):
            generation.choose(ticket.prompt, output)
            return
        if generation.take(ticket.prompt, output):
            self.loop.cancel(ticket, output.candidate)
        if generation.is_to_rank(ticket.prompt):
            self.loop.call(ticket, partial(generation.rank, ticket.prompt))

    def _fail_all(self) -> None:
        """End all requests with an error, and the process once that is sent."""
        for answer in self.live.values():
            if not answer.error:
                answer.error = Refusal("the decoder failed and is restarted: try again", 500)
        threading.Timer(SECONDS_TO_ANSWER, os._exit, (1,)).start()

    def _next_chunk(self, answer: Answer) -> Chunk:
        is_first = not answer.status
        text = self._guarded(answer, Answer.drain)
        if text is None:  # now the answer is an error, which does not fail
            text = answer.drain()
        is_last = answer.done
        if is_last:
            failed_late = answer.error and answer.status == 200
            self.finish(answer, "error" if failed_late else str(answer.status))
        return Chunk(text, answer.status, answer.content_type, is_first, is_last)

    def finish(self, answer: Answer, result: str) -> None:
        """Forget a request and free its slots. `result` is for the metrics: its status, "left", or
        "error" after a status 200."""
        ended = time.monotonic()
        del self.live[answer.id]
        for ticket in answer.tickets:
            self.loop.cancel(ticket)
        self._report(answer, result, ended)

    def _report(self, answer: Answer, result: str, ended: float) -> None:
        """Record the figures of a request that ended at `ended`, and log them in one line."""
        kind, first_token, n_prompt, n_cached, n_new = "none", 0.0, 0, 0, 0
        generation = answer.generation
        if generation:
            kind, first_token = generation.kind, generation.first_token
            n_prompt, n_cached = generation.n_prompt_tokens, generation.n_cached
            n_new = generation.n_drawn_tokens
        first_seconds = (first_token or ended) - answer.began
        self._record("counter", "requests", 1, kind, result)
        self._record("counter", "prompt_tokens", n_prompt)
        self._record("counter", "cached_tokens", n_cached)
        self._record("counter", "generated_tokens", n_new)
        if generation and first_token:
            longest = max(choice.n_tokens for drawn in generation.candidates for choice in drawn)
            self._record("histogram", "first_token_seconds", first_seconds)
            self._record("histogram", "token_seconds", (ended - first_token) / longest)
        line = "%s %s %s %s: %d + %d tokens, first %.3f s, all %.3f s"
        figures = (n_prompt, n_new, first_seconds, ended - answer.began)
        log.info(line, answer.id, self.model.name, kind, result, *figures)

    def _record(self, kind: str, name: str, value: float, *labels: str) -> None:
        self.record(kind, f"gptchat_{name}", value, [self.model.name, *labels])

    def _record_load(self) -> None:
        load = (len(self.live), *self.loop.load)
        if load != self.recorded_load:
            self.recorded_load = load
            for name, value in zip(GAUGES, load, strict=True):
                self._record("gauge", name, value)

"""The server's logic, without TorchServe: HTTP requests in, chunks of answers out, by rounds.

A round (`Service.round`) takes in the requests that are new, drops those whose client has left,
waits until the decode thread has something to say, and returns one chunk for every live request,
often empty. Its caller is one thread.

Invariants: `round` never raises: TorchServe would end every live request. What goes wrong for one
request becomes that request's own error. A finished request holds no slot of the engine and is in
no table here. When the decode thread has died, the next round that has live requests tells them so,
and the process ends, to be restarted by TorchServe. Metrics and log lines hold no text of any
request.
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

# Receives every figure: its kind (counter, gauge or histogram), name, value and labels.
Record = Callable[[str, str, float, list[str]], None]

log = logging.getLogger("gptchat")


class Arrival(NamedTuple):
    """A request as it came; `body` is a parsed JSON object, raw bytes, text, or None."""

    headers: Mapping[str, Any]
    body: Any

    def header(self, wanted: str, default: str) -> str:
        """A header by its name in lower case; the client's own spelling may differ."""
        for name, value in self.headers.items():
            if name.lower() == wanted:
                return str(value)
        return default


class Chunk(NamedTuple):
    """The next piece of an answer. Its status and content type are those of the first chunk."""

    text: str
    status: int
    content_type: str
    is_first: bool
    is_last: bool


def check_host(header: str, names: Collection[str]) -> None:
    """Raise Refusal if a Host header names neither one of `names` nor an IP address.

    A page elsewhere whose name is made to point to this machine (DNS rebinding) is refused so: its
    browser sends that name.
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
        # whose each request to the engine is: the answer, and the number of the prompt in it
        self.owners: dict[Ticket, tuple[Answer, int]] = {}
        self.recorded_load: tuple[int, ...] = ()

    def start(self) -> None:
        self.loop.start()
        self._record_load()

    def round(self, ids: Sequence[str], arrivals: Mapping[str, Arrival]) -> list[Chunk]:
        """The next chunk of every live request, in the order of `ids`; `arrivals` are new."""
        self._take_in(ids, arrivals)
        answered = any(answer.done for answer in self.live.values())
        for result in self.loop.collect(hurry=answered):
            self._deliver(result)
        if self.loop.failure and self.live:
            self._fail_all()
        chunks = [self._next_chunk(self.live[id]) for id in ids]
        self._record_load()
        return chunks

    def _take_in(self, ids: Sequence[str], arrivals: Mapping[str, Arrival]) -> None:
        """Open the new requests, forget those that `ids` lacks, and submit the new ones."""
        for id in self.live.keys() - ids:
            self.finish(self.live[id], "left")
        for id, arrival in arrivals.items():
            self.live[id] = Answer(id)
            self._guarded(self.live[id], self.open, arrival)
        for id in arrivals:  # all together, so that the engine can prefill them together
            self.submit(self.live[id])

    def _guarded(self, answer: Answer, action: Callable[..., Any], *arguments: Any) -> Any:
        """Do something for a request. What goes wrong is its own error; then this returns None."""
        try:
            return action(answer, *arguments)
        except Refusal as refusal:
            answer.error = refusal
        except Exception:
            log.exception("request %s failed", answer.id)
            answer.error = Refusal("internal error", 500)
        return None

    def open(self, answer: Answer, arrival: Arrival) -> None:
        """Read a request, so that its answer can begin. Raises Refusal."""
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
        max_requests = self.model.settings.max_requests
        if len(self.live) > max_requests:
            message = (
                f"the queue is full: {max_requests} requests (max_requests) are being answered"
            )
            raise Refusal(f"{message}; try later", 503)
        live = [other.generation for other in self.live.values() if other.generation]
        answer.generation = self.routes.post(path, arrival.body, answer.id, live)

    def submit(self, answer: Answer) -> None:
        """Hand a request's prompts to the engine, if it has any."""
        if answer.generation is None or answer.error:
            return
        for number, request in enumerate(answer.generation.requests):
            ticket = Ticket(request, answer.generation.stream)
            answer.tickets.append(ticket)
            self.owners[ticket] = (answer, number)
            self.loop.submit(ticket)

    def _deliver(self, result: Result) -> None:
        """Give an output to its answer; those of requests that have been forgotten are dropped."""
        ticket, output = result
        if ticket in self.owners:
            answer, prompt = self.owners[ticket]
            self._guarded(answer, self.take, ticket, prompt, output)

    def take(self, answer: Answer, ticket: Ticket, prompt: int, output: Any) -> None:
        """Add an output, or a ranking of candidates, to its answer.

        Frees the slot of a candidate that a stop string ended; has candidates ranked once they all
        have ended.
        """
        if isinstance(output, Exception):
            raise output
        generation = answer.generation
        if generation is None:
            return
        if not isinstance(output, Output):
            generation.choose(prompt, output)
            return
        if generation.take(prompt, output):
            self.loop.cancel(ticket, output.candidate)
        if generation.is_to_rank(prompt):
            self.loop.call(ticket, partial(generation.rank, prompt))

    def _fail_all(self) -> None:
        """Tell everybody that the decode thread has died; end the process once that is sent."""
        for answer in self.live.values():
            if not answer.error:
                answer.error = Refusal("the decoder failed and is restarted: try again", 500)
        threading.Timer(SECONDS_TO_ANSWER, os._exit, (1,)).start()

    def _next_chunk(self, answer: Answer) -> Chunk:
        is_first = not answer.started
        text = self._guarded(answer, Answer.drain)
        if text is None:  # that failed, and an error can always be told
            text = answer.drain()
        is_last = answer.done
        if is_last:
            failed_late = answer.error and answer.status == 200
            self.finish(answer, "error" if failed_late else str(answer.status))
        return Chunk(text, answer.status, answer.content_type, is_first, is_last)

    def finish(self, answer: Answer, result: str) -> None:
        """Forget a request and free its slots. `result` is its status, "left", or "error" where the
        status 200 had gone out before."""
        ended = time.monotonic()
        del self.live[answer.id]
        for ticket in answer.tickets:
            del self.owners[ticket]
            self.loop.cancel(ticket)
        self._report(answer, result, ended)

    def _report(self, answer: Answer, result: str, ended: float) -> None:
        """Record the figures of a request that ended at `ended`; log one line without its text."""
        kind, first_token, n_prompt, n_cached, n_new = "none", 0.0, 0, 0, 0
        if answer.generation:
            kind = answer.generation.kind
            first_token = answer.generation.first_token
            n_prompt = answer.generation.n_prompt_tokens
            n_new = answer.generation.n_drawn_tokens
            n_cached = answer.generation.n_cached
            for name in sorted(answer.generation.ignored):
                self._record("counter", "ignored_fields", 1, name)
        first_seconds = (first_token or ended) - answer.began
        self._record("counter", "requests", 1, kind, result)
        self._record("counter", "prompt_tokens", n_prompt)
        self._record("counter", "cached_tokens", n_cached)
        self._record("counter", "generated_tokens", n_new)
        if answer.generation and first_token:
            drawn = [choice for each in answer.generation.candidates for choice in each]
            longest = max(choice.n_tokens for choice in drawn)
            self._record("histogram", "first_token_seconds", first_seconds)
            self._record("histogram", "token_seconds", (ended - first_token) / longest)
        line = "%s %s %s %s: %d + %d tokens, first %.3f s, all %.3f s"
        figures = (n_prompt, n_new, first_seconds, ended - answer.began)
        log.info(line, answer.id, self.model.name, kind, result, *figures)

    def _record(self, kind: str, name: str, value: float, *labels: str) -> None:
        self.record(kind, f"gptchat_{name}", value, [self.model.name, *labels])

    def _record_load(self) -> None:
        """Record how much there is to do, where that has changed."""
        load = (len(self.live), *self.loop.load)
        if load == self.recorded_load:
            return
        self.recorded_load = load
        for name, value in zip(GAUGES, load, strict=True):
            self._record("gauge", name, value)

"""The decode thread: an actor, and the only user of the engine.

The handler's thread puts requests, cancellations and the beginning of a round into the inbox, which
the decode thread reads between two steps. At the end of a round all outputs since the last one go
into the outbox, as one batch. Only the decode thread writes `failure` and `load`.

A round costs as much as several steps of a small model, so it lasts ROUND_SECONDS. It ends early
for the first token of a stream, for the end of an answer, and if the next step would overrun it.

TorchServe reports only in a round that a client has left, and begins none while nobody asks. So the
decode thread makes at most MAX_STEPS_AHEAD steps between two rounds.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from gptchat.inference.engine import Engine, Output, Request

ROUND_SECONDS = 0.02  # 50 pieces of a stream's text a second
MAX_STEPS_AHEAD = 4


@dataclass(eq=False)
class Ticket:
    """A request for the engine. The last two fields belong to the decode thread."""

    request: Request
    stream: bool  # its first token ends a round
    owner: Any = None  # the caller's, as the next one
    prompt: int = 0  # number of the prompt in its request
    engine_id: int = 0
    has_token: bool = False


# An output of a request, what a call for it returned, or the exception that either raised.
Result = tuple[Ticket, Any]


class DecodeLoop(threading.Thread):
    """Runs `engine.step()` while there is work.

    `failure` is what a step raised, which ends the thread. `load` is (slots in use, requests that
    wait for one) at the end of the last round.
    """

    def __init__(self, engine: Engine):
        super().__init__(name="decode", daemon=True)
        self.engine = engine
        self.inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.outbox: SimpleQueue[list[Result]] = SimpleQueue()
        self.failure: BaseException | None = None
        self.load = (0, 0)
        # The decode thread's own:
        self.tickets: dict[int, Ticket] = {}  # by the engine's id
        self.batch: list[Result] = []
        self.deadline: float | None = None  # of the round, by time.monotonic(); None: no round
        self.due = False  # the batch should not wait for the deadline
        self.steps_ahead = 0  # since the last round ended

    def submit(self, ticket: Ticket) -> None:
        self.inbox.put(partial(self._submit, ticket))

    def cancel(self, ticket: Ticket, candidate: int | None = None) -> None:
        """Have the engine forget one candidate or the whole request. Outputs may still come."""
        self.inbox.put(partial(self._cancel, ticket, candidate))

    def call(self, ticket: Ticket, function: Callable[[], Any]) -> None:
        """Have a function run between two steps, which may use the model."""
        self.inbox.put(partial(self._call, ticket, function))

    def collect(self, hurry: bool) -> list[Result]:
        """Make a round and return its batch. In a hurry it ends with the step under way."""
        if self.failure:
            return []
        self.inbox.put(partial(self._begin_round, hurry))
        return self.outbox.get()

    def run(self) -> None:
        try:
            while True:
                self._read_inbox()
                began = time.monotonic()
                outputs = self.engine.step()
                self._end_step(outputs, time.monotonic() - began)
        except BaseException as error:
            logging.exception("the decode thread ended")
            self.failure = error
            self._end_round()

    def _read_inbox(self) -> None:
        """Do all that the inbox asks for. Return when a step is to be made."""
        while True:
            in_round = self.deadline is not None
            if in_round and (self.due or self.engine.idle):
                self._end_round()
                in_round = False
            may_step = in_round or self.steps_ahead < MAX_STEPS_AHEAD
            try:
                action = self.inbox.get(block=self.engine.idle or not may_step)
            except Empty:
                return
            action()

    def _submit(self, ticket: Ticket) -> None:
        try:
            ticket.engine_id = self.engine.submit(ticket.request)
            self.tickets[ticket.engine_id] = ticket
        except Exception as error:
            self._hand_over(ticket, error)

    def _cancel(self, ticket: Ticket, candidate: int | None) -> None:
        self.engine.cancel(ticket.engine_id, candidate)
        if candidate is None:
            self.tickets.pop(ticket.engine_id, None)

    def _call(self, ticket: Ticket, function: Callable[[], Any]) -> None:
        try:
            self._hand_over(ticket, function())
        except Exception as error:
            self._hand_over(ticket, error)

    def _hand_over(self, ticket: Ticket, result: Any) -> None:
        self.batch.append((ticket, result))
        self.due = True

    def _begin_round(self, hurry: bool) -> None:
        self.deadline = time.monotonic() + ROUND_SECONDS
        self.due = self.due or hurry

    def _end_step(self, outputs: list[Output], seconds: float) -> None:
        self.steps_ahead += 1
        for output in outputs:
            ticket = self.tickets[output.request_id]
            self.batch.append((ticket, output))
            is_first = ticket.stream and not ticket.has_token
            self.due = self.due or is_first or output.finish_reason is not None
            ticket.has_token = True
        if self.deadline is not None and time.monotonic() + seconds > self.deadline:
            self.due = True

    def _end_round(self) -> None:
        self.load = (self.engine.live, self.engine.queued)
        self.outbox.put(self.batch)
        self.batch = []
        self.deadline = None
        self.due = False
        self.steps_ahead = 0

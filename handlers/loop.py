"""The decode thread: it alone touches the engine, while the handler's thread speaks with TorchServe."""

import logging
import threading
from collections import deque
from dataclasses import dataclass

from gptchat.engine import Engine, Output, Request

AHEAD = 4  # steps decoded while nobody collects: without a bound the thread would decode for clients that have left


@dataclass(eq=False)
class Ticket:
    """A request in the engine's hands: its HTTP request and its place there."""

    owner: str
    place: int
    request: Request
    urgent: bool  # each token is worth a round to the client, not only the last one
    number: int = 0  # the engine's
    unfinished: int = 0  # candidates


class DecodeLoop(threading.Thread):
    """Runs `engine.step()` while there is work. `failure` is what ended the thread, if anything did."""

    def __init__(self, engine: Engine):
        super().__init__(name="decode", daemon=True)
        self.engine = engine
        self.failure: BaseException | None = None
        self._changed = threading.Condition()
        self._orders: deque[tuple[Ticket, int | None]] = deque()  # a candidate to cancel, -1 for all; None submits
        self._events: list[tuple[Ticket, Output | ValueError]] = []
        self._tickets: dict[int, Ticket] = {}
        self._urgent = self._collecting = False
        self._ahead = 0

    def submit(self, ticket: Ticket) -> None:
        self._order(ticket, None)

    def cancel(self, ticket: Ticket, candidate: int = -1) -> None:
        """Free a request's slots, or a candidate's; outputs of it that were decoded already may still come."""
        self._order(ticket, candidate)

    def collect(self, patience: float) -> list[tuple[Ticket, Output | ValueError]]:
        """What has happened since the last call; waits up to `patience` seconds for something urgent."""
        with self._changed:
            self._ahead, self._collecting = 0, True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._urgent or self.failure, patience)
            self._collecting = self._urgent = False
            events, self._events = self._events, []
        return events

    def run(self) -> None:
        try:
            while True:
                self._round()
        except BaseException as error:
            logging.exception("the decode thread ended")
            with self._changed:
                self.failure = error
                self._changed.notify_all()

    def _order(self, ticket: Ticket, candidate: int | None) -> None:
        with self._changed:
            self._orders.append((ticket, candidate))
            self._changed.notify_all()

    def _may_go(self) -> bool:
        return bool(self._orders) or (not self.engine.idle and (self._collecting or self._ahead < AHEAD))

    def _round(self) -> None:
        with self._changed:
            self._changed.wait_for(self._may_go)
            orders = [self._orders.popleft() for _ in range(len(self._orders))]
        refused = [(ticket, error) for ticket, candidate in orders if (error := self._follow(ticket, candidate))]
        outputs = [] if self.engine.idle else self.engine.step()
        with self._changed:
            self._ahead += 1
            self._events += refused
            self._urgent |= bool(refused)
            for output in outputs:
                self._deliver(output)
            if self._urgent:
                self._changed.notify_all()

    def _follow(self, ticket: Ticket, candidate: int | None) -> ValueError | None:
        if candidate is not None:
            self.engine.cancel(ticket.number, None if candidate < 0 else candidate)
            ticket.unfinished -= 1 if candidate >= 0 else ticket.unfinished
        else:
            try:
                ticket.number = self.engine.submit(ticket.request)
            except ValueError as error:
                return error
            ticket.unfinished = ticket.request.n
            self._tickets[ticket.number] = ticket
        if ticket.unfinished <= 0:
            self._tickets.pop(ticket.number, None)
        return None

    def _deliver(self, output: Output) -> None:
        if ticket := self._tickets.get(output.request_id):
            ticket.unfinished -= output.finish_reason is not None
            if ticket.unfinished <= 0:
                del self._tickets[ticket.number]
            self._events.append((ticket, output))
            self._urgent |= ticket.urgent or output.finish_reason is not None

"""The decode thread: it alone touches the engine, while the handler's thread speaks with TorchServe."""

import logging
import threading

from gptchat.engine import Engine, Output, Request

AHEAD = 4  # steps decoded while nobody collects: without a bound the thread would decode for clients that have left
Key = tuple[str, int]  # the HTTP request, and which of its prompts
Event = tuple[Key, Output | ValueError]


class DecodeLoop(threading.Thread):
    """Runs `engine.step()` while there is work. `failure` is what ended the thread, if anything did."""

    def __init__(self, engine: Engine):
        super().__init__(name="decode", daemon=True)
        self.engine, self.changed = engine, threading.Condition()
        self.failure: BaseException | None = None
        self.orders: list[tuple[Key, Request | int | None]] = []
        self.events: list[Event] = []
        self.numbers: dict[Key, int] = {}  # the engine's
        self.keys: dict[int, Key] = {}
        self.hurried: set[Key] = set()  # each token is worth a round to the client, not only the last one
        self.urgent = self.collecting = False
        self.ahead = 0

    def order(self, key: Key, what: Request | int | None, hurried: bool = False) -> None:
        """Submit a request, cancel one of its candidates (a number), or forget it (None, due to each in the end)."""
        with self.changed:
            self.orders.append((key, what))
            if hurried:
                self.hurried.add(key)
            self.changed.notify_all()

    def collect(self, patience: float) -> list[Event]:
        """What has happened since the last call; waits up to `patience` seconds for something urgent."""
        with self.changed:
            self.ahead, self.collecting = 0, True
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.urgent or self.failure, patience)
            self.collecting = self.urgent = False
            events, self.events = self.events, []
        return events

    def run(self) -> None:
        try:
            while True:
                self.round()
        except BaseException as error:
            logging.exception("the decode thread ended")
            with self.changed:
                self.failure = error
                self.changed.notify_all()

    def may_go(self) -> bool:
        return bool(self.orders) or (not self.engine.idle and (self.collecting or self.ahead < AHEAD))

    def round(self) -> None:
        with self.changed:
            self.changed.wait_for(self.may_go)
            orders, self.orders = self.orders, []
        events: list[Event] = [(key, error) for key, what in orders if (error := self.follow(key, what))]
        outputs = [] if self.engine.idle else self.engine.step()
        events += [(self.keys[output.request_id], output) for output in outputs if output.request_id in self.keys]
        with self.changed:
            self.ahead += 1
            self.events += events
            self.urgent |= any(key in self.hurried or getattr(event, "finish_reason", "no") for key, event in events)
            self.changed.notify_all()

    def follow(self, key: Key, what: Request | int | None) -> ValueError | None:
        if isinstance(what, Request):
            try:
                self.numbers[key] = number = self.engine.submit(what)
                self.keys[number] = key
            except ValueError as error:  # it can never fit
                return error
        elif key in self.numbers:
            self.engine.cancel(self.numbers[key], what)
            if what is None:
                self.hurried.discard(key)
                del self.keys[self.numbers.pop(key)]
        return None

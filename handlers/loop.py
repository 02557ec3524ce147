"""The decode thread, which runs the engine while the handler's thread speaks with TorchServe."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gptchat.inference.engine import Engine, Output

# Steps decoded while nobody collects: without a bound the thread would decode for clients that have left. If they were
# the only ones, TorchServe calls the handler no more, until someone asks: their slots wait for that, idle.
AHEAD = 4


class DecodeLoop(threading.Thread):
    """Runs `engine.step()` while there is work. `failure` is what ended the thread, if anything did."""

    def __init__(self, engine: Engine):
        super().__init__(name="decode", daemon=True)
        self.engine, self.changed = engine, threading.Condition()
        self.failure: BaseException | None = None
        self.outputs: list[Output] = []
        self.streaming_ids: set[int] = (
            set()
        )  # requests whose every token is worth a round to the client, not the last only
        self.stepping = self.wanted = self.collecting = self.urgent = False
        self.ahead, self.load = (
            0,
            (0, 0),
        )  # and slots in use and requests in the queue, between two steps

    @contextmanager
    def at_rest(self) -> Iterator[Engine]:
        """The engine between two steps, to submit and cancel."""
        with self.changed:
            self.wanted = True
            self.changed.wait_for(lambda: not self.stepping)
            try:
                yield self.engine
            finally:
                self.wanted, self.load = False, (self.engine.live, self.engine.queued)
                self.changed.notify_all()

    def collect(self, patience: float) -> list[Output]:
        """The outputs since the last call; waits up to `patience` seconds for one that is urgent."""
        with self.changed:
            self.ahead, self.collecting = 0, True
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.urgent or self.failure, patience)
            # no newcomer is admitted before a step ends, and each round costs TorchServe and us milliseconds
            self.changed.wait_for(
                lambda: self.ahead or not self.stepping or self.failure, 100 * patience
            )
            self.collecting = self.urgent = False
            outputs, self.outputs = self.outputs, []
        return outputs

    def run(self) -> None:
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(
                        lambda: (
                            not (self.wanted or self.engine.idle)
                            and (self.collecting or self.ahead < AHEAD)
                        )
                    )
                    self.stepping = True
                outputs = self.engine.step()
                with self.changed:
                    self.stepping, self.ahead = False, self.ahead + 1
                    self.outputs += outputs
                    self.load = self.engine.live, self.engine.queued
                    self.urgent |= any(
                        o.finish_reason or o.request_id in self.streaming_ids for o in outputs
                    )
                    self.changed.notify_all()
        except BaseException as error:
            logging.exception("the decode thread ended")
            with self.changed:
                self.stepping, self.failure = False, error
                self.changed.notify_all()

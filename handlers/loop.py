"""The decode thread: it runs the engine while the handler's thread speaks with TorchServe.

Only one thread may use the engine at a time. The decode thread has it during a step; the handler's
thread takes it between two steps, in `at_rest`, to submit or cancel. `collect` hands over what has
been decoded since the last call.

Invariants: while `stepping` is true, only the decode thread touches the engine. State changes under
the lock of `changed`, except `streaming_ids`: only the handler's thread changes it, and the decode
thread only looks ids up. `failure` and `load` may be read without the lock. `at_rest` may be
nested: the lock is re-entrant, and the inner block finds the engine at rest. A step that raises
ends the thread; the exception is kept in `failure`.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gptchat.inference.engine import Engine, Output

# Steps decoded while nobody collects. A client that has left is noticed only in a round, and
# without live clients TorchServe starts no round until somebody asks. Without this bound the thread
# would decode for such clients to the end; with it their slots stay taken, but idle, until then.
MAX_STEPS_AHEAD = 4


class DecodeLoop(threading.Thread):
    """Runs `engine.step()` while there is work. `failure` is the exception that ended it."""

    def __init__(self, engine: Engine):
        super().__init__(name="decode", daemon=True)
        self.engine = engine
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self.outputs: list[Output] = []  # not collected yet
        self.streaming_ids: set[int] = set()  # requests whose every token is worth a round
        self.stepping = False
        self.rest_wanted = False  # somebody waits in `at_rest`: start no step
        self.collecting = False  # somebody waits in `collect`
        self.urgent = False  # `outputs` has something that a client waits for
        self.steps_ahead = 0  # since the last `collect`
        self.load = (0, 0)  # slots in use and requests in the queue, between two steps

    @contextmanager
    def at_rest(self) -> Iterator[Engine]:
        """The engine between two steps, to submit and cancel."""
        with self.changed:
            self.rest_wanted = True
            self.changed.wait_for(lambda: not self.stepping)
            try:
                yield self.engine
            finally:
                self.rest_wanted = False
                self.load = (self.engine.live, self.engine.queued)
                self.changed.notify_all()

    def collect(self, patience: float) -> list[Output]:
        """The outputs since the last call; waits up to `patience` seconds for one that is urgent.

        Then it waits for the end of the step under way (100 times `patience` at most): a new
        request could not be admitted earlier, and each round costs TorchServe and us milliseconds.
        """
        with self.changed:
            self.steps_ahead = 0
            self.collecting = True
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.urgent or self.failure, patience)
            self.changed.wait_for(
                lambda: self.steps_ahead or not self.stepping or self.failure, 100 * patience
            )
            self.collecting = False
            self.urgent = False
            outputs = self.outputs
            self.outputs = []
        return outputs

    def run(self) -> None:
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(self._may_step)
                    self.stepping = True
                outputs = self.engine.step()
                with self.changed:
                    self._end_step(outputs)
        except BaseException as error:
            logging.exception("the decode thread ended")
            with self.changed:
                self.stepping = False
                self.failure = error
                self.changed.notify_all()

    def _may_step(self) -> bool:
        if self.rest_wanted or self.engine.idle:
            return False
        return self.collecting or self.steps_ahead < MAX_STEPS_AHEAD

    def _end_step(self, outputs: list[Output]) -> None:
        """Note that a step has ended, with these outputs."""
        self.stepping = False
        self.steps_ahead += 1
        self.outputs += outputs
        self.load = (self.engine.live, self.engine.queued)
        self.urgent |= any(
            output.finish_reason or output.request_id in self.streaming_ids for output in outputs
        )
        self.changed.notify_all()

"""The decode thread: it runs the engine while the handler's thread speaks with TorchServe.

Only one thread may use the engine at a time. The decode thread has it during a step; the handler's
thread takes it between two steps, in `at_rest`, to submit or cancel. `collect` hands over what has
been decoded since the last call.

Each round costs TorchServe, the clients and us a millisecond or more, of which a step of a small
model has time for several. So the tokens of streams are gathered for ROUND_SECONDS. Nobody waits
longer for the first token of a stream, for the end of an answer, or for a step that takes longer.

Invariants: while `stepping` is true, only the decode thread touches the engine. State changes under
`lock`, which is re-entrant, so that `at_rest` may be nested: the inner block finds the engine at
rest. `failure` and `load` may be read without it. A step that raises ends the thread; the exception
is kept in `failure`. A thread is woken only for what it waits for: one that wakes up after each
step of a small model, to look, costs a fifth of the step.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gptchat.inference.engine import Engine, Output

ROUND_SECONDS = 0.02  # that a round waits for the decode thread; 50 pieces of text a second
# Steps decoded while nobody collects. A client that has left is noticed only in a round, and
# without live clients TorchServe starts no round until somebody asks. Without this bound the thread
# would decode for such clients to the end; with it their slots stay taken, but idle, until then.
MAX_STEPS_AHEAD = 4


class DecodeLoop(threading.Thread):
    """Runs `engine.step()` while there is work. `failure` is the exception that ended it."""

    def __init__(self, engine: Engine):
        super().__init__(name="decode", daemon=True)
        self.engine = engine
        self.lock = threading.RLock()
        self.may_step = threading.Condition(self.lock)  # the decode thread waits for it
        self.at_step_end = threading.Condition(self.lock)  # the handler's thread waits for it
        self.failure: BaseException | None = None
        self.outputs: list[Output] = []  # not collected yet
        self.streaming_ids: set[int] = set()  # requests whose tokens are worth a round
        self.started_ids: set[int] = set()  # those of them that have had a token
        self.stepping = False
        self.rest_wanted = False  # somebody waits in `at_rest`: start no step
        self.collecting = False  # somebody waits in `collect`, and nothing is urgent yet
        self.deadline = 0.0  # time.monotonic() at which `collect` ends, if no step is under way
        self.urgent = False  # `outputs` has something that a client waits for
        self.steps_ahead = 0  # since the last `collect`
        self.load = (0, 0)  # slots in use and requests in the queue, between two steps

    @contextmanager
    def at_rest(self) -> Iterator[Engine]:
        """The engine between two steps, to submit and cancel."""
        with self.lock:
            self.rest_wanted = True
            self.at_step_end.wait_for(lambda: not self.stepping)
            try:
                yield self.engine
            finally:
                self.rest_wanted = False
                self.load = (self.engine.live, self.engine.queued)
                self.may_step.notify()

    def stream(self, id: int) -> None:
        """From now on the tokens of this request are worth a round. Called in `at_rest`."""
        self.streaming_ids.add(id)

    def forget(self, id: int) -> None:
        """A request has ended."""
        with self.lock:
            self.streaming_ids.discard(id)
            self.started_ids.discard(id)

    def collect(self, patience: float) -> list[Output]:
        """The outputs since the last call; waits up to `patience` seconds for one that is urgent.

        Then it waits for the end of the step under way (100 times `patience` at most): a new
        request could not be admitted earlier.
        """
        with self.lock:
            self.steps_ahead = 0
            self.collecting = not self.urgent
            self.deadline = time.monotonic() + patience
            self.may_step.notify()
            self.at_step_end.wait_for(lambda: self.urgent or self.failure, patience)
            self.at_step_end.wait_for(
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
                with self.lock:
                    self.may_step.wait_for(self._has_work)
                    self.stepping = True
                began = time.monotonic()
                outputs = self.engine.step()
                with self.lock:
                    self._end_step(outputs, time.monotonic() - began)
        except BaseException as error:
            logging.exception("the decode thread ended")
            with self.lock:
                self.stepping = False
                self.failure = error
                self.at_step_end.notify()

    def _has_work(self) -> bool:
        if self.rest_wanted or self.engine.idle:
            return False
        return self.collecting or self.steps_ahead < MAX_STEPS_AHEAD

    def _end_step(self, outputs: list[Output], seconds: float) -> None:
        """Note that a step has ended, with these outputs, after so many seconds."""
        self.stepping = False
        self.steps_ahead += 1
        self.outputs += outputs
        self.load = (self.engine.live, self.engine.queued)
        now = time.monotonic()
        streaming = self.streaming_ids.intersection(output.request_id for output in outputs)
        self.urgent |= any(output.finish_reason for output in outputs)
        self.urgent |= not streaming <= self.started_ids
        # The next step would end after the round.
        self.urgent |= bool(streaming) and now + seconds > self.deadline
        self.started_ids |= streaming
        if self.urgent and self.collecting:
            self.collecting = False
            self.steps_ahead = 1
        if self.urgent or self.rest_wanted or now >= self.deadline:
            self.at_step_end.notify()

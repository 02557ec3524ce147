"""The decode thread's rounds: what is handed over at once, and what is gathered."""

import time
from contextlib import contextmanager

import pytest

from gptchat.inference.engine import Output
from handlers.loop import MAX_STEPS_AHEAD, DecodeLoop

FOREVER = 60  # seconds, which no test takes unless it fails


class ScriptedEngine:
    """Its steps give these outputs, one after another; then it is idle."""

    live = queued = 0

    def __init__(self, script):
        self.script = script
        self.steps = 0

    @property
    def idle(self):
        return self.steps == len(self.script)

    def step(self):
        outputs = self.script[self.steps]
        self.steps += 1
        if isinstance(outputs, Exception):
            raise outputs
        time.sleep(0.001)
        return outputs


@contextmanager
def running(script, streams=()):
    loop = DecodeLoop(ScriptedEngine(script))
    for id in streams:
        loop.stream(id)
    loop.start()
    yield loop
    with loop.at_rest() as engine:
        engine.script = script[: engine.steps]  # the thread waits from now on


def token(id):
    return [Output(id, 0, 7)]


def has_ended(outputs):
    return any(output.finish_reason for output in outputs)


def test_first_token_of_a_stream_is_handed_over_at_once():
    with running([token(1)] * 100, streams=[1]) as loop:
        assert 1 <= len(loop.collect(FOREVER)) <= MAX_STEPS_AHEAD


def test_first_token_of_a_second_stream_is_handed_over_at_once():
    with running([token(1)] * 10 + [token(2) + token(1)] * 100, streams=[1, 2]) as loop:
        loop.collect(FOREVER)
        assert 2 in [output.request_id for output in loop.collect(FOREVER)]


def test_further_tokens_of_a_stream_are_gathered():
    with running([token(1)] * 10_000, streams=[1]) as loop:
        loop.collect(FOREVER)
        assert len(loop.collect(0.1)) > MAX_STEPS_AHEAD


def test_stream_does_not_wait_for_a_step_that_ends_after_the_round():
    with running([token(1)] * 3, streams=[1]) as loop:
        loop.collect(FOREVER)
    with loop.lock:
        loop.urgent = False
        loop.deadline = time.monotonic() + FOREVER
        loop._end_step(token(1), seconds=FOREVER / 2)
        assert not loop.urgent
        loop._end_step(token(1), seconds=2 * FOREVER)
        assert loop.urgent


@pytest.mark.parametrize("streams", [[], [1]])
def test_end_of_an_answer_is_handed_over_at_once(streams):
    end = [Output(1, 0, finish_reason="stop")]
    with running([token(1)] * 3 + [end] + [token(2)] * 100, streams) as loop:
        outputs = loop.collect(FOREVER)
        if not has_ended(outputs):
            outputs += loop.collect(FOREVER)
        assert has_ended(outputs)


def test_nobody_waits_for_answers_that_are_not_streamed():
    with running([token(1)] * 10_000) as loop:
        began = time.monotonic()
        assert len(loop.collect(0.05)) > MAX_STEPS_AHEAD
        assert time.monotonic() - began >= 0.05


def test_decoding_stops_ahead_of_a_round_that_does_not_come():
    with running([token(1)] * 100) as loop:
        loop.collect(0)
        time.sleep(0.1)
        assert loop.engine.steps <= 2 * MAX_STEPS_AHEAD


def test_failure_ends_a_round_and_stays():
    error = ValueError("no")
    with running([token(1), error]) as loop:
        loop.collect(FOREVER)
        assert loop.failure is error


def test_forgotten_id_can_stream_again():
    with running([token(1)] * 100, streams=[1]) as loop:
        loop.collect(FOREVER)
        loop.forget(1)
        assert not loop.streaming_ids and not loop.started_ids

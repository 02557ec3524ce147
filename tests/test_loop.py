"""The decode thread's rounds: what is handed over at once, and what is gathered."""

import time
from contextlib import contextmanager

import pytest

from gptchat.inference.draw import Scored
from gptchat.inference.engine import Output
from handlers import loop as loop_module
from handlers.loop import MAX_STEPS_AHEAD, DecodeLoop, Ticket


class ScriptedEngine:
    """Request number i gets id i. The steps give these outputs, one after another; then it is
    idle."""

    live = queued = 0

    def __init__(self, script):
        self.script = script
        self.steps = self.submitted = 0

    @property
    def idle(self):
        return self.steps == len(self.script)

    def submit(self, request):
        self.submitted += 1
        return self.submitted

    def step(self):
        outputs = self.script[self.steps]
        self.steps += 1
        if isinstance(outputs, Exception):
            raise outputs
        time.sleep(0.001)
        return outputs


@contextmanager
def running(monkeypatch, script, streams=(False, False), round_seconds=60):
    """The thread, with a request for each of `streams`."""
    monkeypatch.setattr(loop_module, "ROUND_SECONDS", round_seconds)
    loop = DecodeLoop(ScriptedEngine(script))
    for stream in streams:
        loop.submit(Ticket(None, stream))
    loop.start()
    yield loop
    loop.inbox.put(lambda: 1 / 0)
    loop.join(60)


def token(*ids):
    return [Output(id, 0, Scored(7)) for id in ids]


def ids(results):
    return [output.request_id for _, output in results]


def test_first_token_of_each_stream_is_handed_over_at_once(monkeypatch):
    script = [token(1)] * 10 + [token(2, 1)] * 1000
    with running(monkeypatch, script, streams=(True, True)) as loop:
        assert ids(loop.collect(hurry=False))[0] == 1
        assert 2 in ids(loop.collect(hurry=False))


@pytest.mark.parametrize("stream", [True, False])
def test_end_of_an_answer_is_handed_over_at_once(monkeypatch, stream):
    end = [Output(1, 0, finish_reason="stop")]
    with running(monkeypatch, [*[token(1)] * 20, end, *[token(2)] * 1000], (stream, False)) as loop:
        if stream:
            loop.collect(hurry=False)
        assert any(output.finish_reason for _, output in loop.collect(hurry=False))


@pytest.mark.parametrize("stream", [True, False])
def test_other_tokens_are_gathered_for_a_round(monkeypatch, stream):
    with running(monkeypatch, [token(1)] * 10_000, (stream, False), round_seconds=0.1) as loop:
        loop.collect(hurry=False)
        assert len(loop.collect(hurry=False)) > MAX_STEPS_AHEAD


def test_round_ends_before_a_step_that_would_end_after_it(monkeypatch):
    with running(monkeypatch, []) as loop:
        loop.collect(hurry=False)
        loop.deadline = time.monotonic() + 60
        loop._end_step(token(1), seconds=30)
        assert not loop.due
        loop._end_step(token(1), seconds=120)
        assert loop.due
        loop.deadline = None


def test_decoding_stops_ahead_of_a_round_that_does_not_come(monkeypatch):
    with running(monkeypatch, [token(1)] * 1000, round_seconds=0) as loop:
        loop.collect(hurry=False)
        time.sleep(0.1)
        assert loop.engine.steps <= MAX_STEPS_AHEAD + 1 + MAX_STEPS_AHEAD  # before, in and after it


def test_round_without_anything_to_decode_ends_at_once(monkeypatch):
    with running(monkeypatch, []) as loop:
        assert loop.collect(hurry=False) == []


def test_round_in_a_hurry_ends_with_the_step_under_way(monkeypatch):
    with running(monkeypatch, [token(1)] * 1000) as loop:
        assert len(loop.collect(hurry=True)) <= MAX_STEPS_AHEAD + 1


def test_request_that_the_engine_refuses_comes_back_with_the_reason(monkeypatch):
    with running(monkeypatch, [token(1)] * 1000) as loop:
        refused = Ticket(None, stream=False)
        error = ValueError("too long")
        monkeypatch.setattr(loop.engine, "submit", lambda request: raise_(error))
        loop.submit(refused)
        assert (refused, error) in loop.collect(hurry=False)
        assert loop.failure is None


def test_failure_ends_a_round_and_stays(monkeypatch):
    error = ValueError("no")
    with running(monkeypatch, [token(1), error]) as loop:
        loop.collect(hurry=False)
        assert loop.failure is error and loop.collect(hurry=False) == []


def raise_(error):
    raise error

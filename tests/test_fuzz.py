"""The OpenAPI description agrees with what reads bodies; a short fuzz; the fuzz finds faults."""

import json
from types import SimpleNamespace

import pytest
import torch
from fuzz import CANARY, Drawer, Fuzz, Probe, Reply, judge, log_findings, start_server, texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemas import Schemas
from serving import tiny_model

from gptchat.config import ServerSettings
from handlers import jobs, unread
from handlers.fields import Fields, Refusal
from handlers.openapi import describe
from handlers.served_model import load_served_model
from handlers.service import Service

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def drawers(tmp_path_factory):
    """task -> (the served model, the drawer of its requests)"""
    made = {}
    for task in ("chatlm", "lm"):
        folder = tiny_model(tmp_path_factory.mktemp(task) / "model", task)
        model = load_served_model(folder, task, ServerSettings(slots=8))
        made[task] = model, Drawer(task, json.loads(json.dumps(describe(model))))
    return made


def tasks_and_paths(drawers):
    return [(model, drawer, path) for model, drawer in drawers.values() for path in drawer.posts]


def read(model, path, body):
    """The job that a body asks for; the path as the handler sees it. Raises Refusal."""
    return jobs.JobReader(dict(body), model).read(path.partition("/1.0/")[2])


def smallest(drawer, path):
    """A valid body, which has the required keys only."""
    values = {"context": "a", "messages": [{"role": "user", "content": "a"}]}
    schema = drawer.schemas.named[drawer.posts[path][0]]
    return {name: values[name] for name in schema["required"]}


def test_both_ends_of_each_described_range_are_taken_and_what_is_beyond_refused(drawers):
    checked = 0
    for model, drawer, path in tasks_and_paths(drawers):
        schema = drawer.schemas.named[drawer.posts[path][0]]
        for name, declared in schema["properties"].items():
            if "minimum" not in declared:
                continue
            body = smallest(drawer, path) | {"max_tokens": 1}
            if name in ("max_new_tokens", "max_completion_tokens"):
                del body["max_tokens"]
            low, high = declared["minimum"], declared["maximum"]
            for value in (low, high):
                try:
                    read(model, path, body | {name: value})
                except Refusal as refusal:
                    assert refusal.code == jobs.TOO_LONG, (path, name, value)
            for value in (low - 1, high + 1):
                with pytest.raises(Refusal) as error:
                    read(model, path, body | {name: value})
                assert error.value.param == name
            checked += 1
    assert checked > 50


def test_every_key_that_is_read_is_described_and_no_other(drawers, monkeypatch):
    taken = set()
    take = Fields.take

    def spy_take(self, name, *arguments):
        taken.add(name)
        return take(self, name, *arguments)

    monkeypatch.setattr(Fields, "take", spy_take)
    for model, drawer, path in tasks_and_paths(drawers):
        taken.clear()
        read(model, path, smallest(drawer, path))
        described = set(drawer.schemas.named[drawer.posts[path][0]]["properties"])
        if "v1" in path:
            taken.update(unread.IGNORED, unread.UNAVAILABLE)
        elif model.name == "lm":
            taken.discard("response")  # read only to be refused
        assert taken == described, path


@pytest.mark.parametrize("task", ["chatlm", "lm"])
@settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_bodies_are_taken_or_refused_as_the_description_says(drawers, task, data):
    model, drawer = drawers[task]
    probe = data.draw(drawer.bodies("valid") | drawer.bodies("nearly"))
    try:
        read(model, probe.path, json.loads(probe.body))
        refusal = None
    except Refusal as error:
        refusal = error
    if probe.expected == "wrong":
        assert refusal
    elif probe.expected == "valid" and refusal:
        assert refusal.code == jobs.TOO_LONG or refusal.param == "n", refusal


def test_service_gives_the_description_of_its_model(drawers):
    model, _ = drawers["lm"]
    page = Service.get(SimpleNamespace(model=model), "v1/openapi.json")
    assert page.content_type == "application/json"
    description = json.loads(page.text)
    assert description == describe(model)
    assert set(description["paths"]) == {
        "/predictions/lm",
        "/predictions/lm/1.0/v1/completions",
        "/predictions/lm/1.0/v1/models",
        "/predictions/lm/1.0/v1/models/lm",
        "/predictions/lm/1.0/v1/openapi.json",
    }


def test_schemas_find_what_does_not_fit():
    schemas = Schemas({"components": {"schemas": {"Name": {"type": "string"}}}}, texts())
    named = {"$ref": "#/components/schemas/Name"}
    whole = {
        "type": "object",
        "properties": {"a": named, "b": {"type": "array", "items": {"enum": [1, 2]}}},
        "required": ["a"],
        "additionalProperties": False,
    }
    assert schemas.fits(whole, {"a": "x", "b": [1, 2]})
    assert schemas.problem(whole, {"b": [3], "c": 1}) == (
        ".a: missing; .b[0]: none of [1, 2]; .c: unknown"
    )
    assert not schemas.fits({"type": "integer", "minimum": 0, "maximum": 1}, True)
    assert not schemas.fits({"type": "boolean"}, 0)
    assert not schemas.fits({"anyOf": [named, {"type": "null"}]}, 1)
    assert not schemas.fits({"type": "string", "minLength": 1, "maxLength": 2}, "abc")


def error_reply(status, **changes):
    error = {"message": "m", "type": "invalid_request_error", "param": None, "code": None}
    return Reply(status, "application/json", json.dumps({"error": error | changes}).encode(), True)


def test_fuzz_finds_a_wrong_answer(drawers):
    _, drawer = drawers["chatlm"]
    probe = Probe("valid", "POST", "/predictions/chatlm", b"{}", answer="OriginalAnswer")
    valid = Probe(**vars(probe) | {"expected": "valid"})
    wrong = Probe(**vars(probe) | {"expected": "wrong"})

    def found(of, reply):
        return judge(drawer.schemas, of, reply)

    assert not found(probe, error_reply(400)) and not found(wrong, error_reply(400))
    assert not found(valid, error_reply(400, code="context_length_exceeded"))
    assert not found(valid, error_reply(503, type="server_error"))
    assert "a valid body was refused" in found(valid, error_reply(400))
    assert "status 500" in found(probe, error_reply(500))
    form = Probe(**vars(probe) | {"content_type": "application/x-www-form-urlencoded"})
    assert "status 500" in found(form, error_reply(500))
    assert not found(form, error_reply(500, type="ErrorDataDecoderException"))
    assert "error.extra: unknown" in found(probe, error_reply(400, extra=1))
    assert "without JSON" in found(probe, Reply(400, "text/html", b"<h1>", True))
    assert "a wrong body got status 200" in found(wrong, Reply(200, "", b"{}", True))
    assert "answer.response: missing" in found(valid, Reply(200, "", b"{}", True))
    assert "cut short" in found(valid, Reply(200, "", b"{}", False))
    assert found(valid, Reply()) == "no answer"
    assert "for a small body" in found(probe, Reply(413, "", b"", True))
    stream = Reply(200, "text/event-stream", b'data: {"token": "a"}\n\n', True)
    assert "without its end" in found(valid, stream)
    stream.body += b"data: [DONE]\n\n"
    assert not found(valid, stream)
    stream.body = b'data: {"error": {}}\n\n' + stream.body
    assert found(valid, stream) == "an error within a stream"


def test_fuzz_finds_text_and_stack_traces_in_the_log():
    clean = "2026-01-01 chatlm original 200: 2 + 56 tokens\n"
    bad = f"ERROR {CANARY}\n\tat a.b.C.d(C.java:1)\nx\x1b[31m\nTraceback (most recent call last):\n"
    assert not log_findings(clean)
    reasons = [finding.what.partition(", the first")[0] for finding in log_findings(clean + bad)]
    assert reasons == [
        "log: text of a request in 1 lines",
        "log: a stack trace in 2 lines",
        "log: a control character in 1 lines",
    ]


@pytest.mark.server
def test_short_fuzz_finds_nothing(tmp_path):
    server = start_server(tmp_path)
    try:
        fuzz = Fuzz(server, ["chatlm", "lm"], seed=0, callers=8)
        fuzz.run(examples=10)
        findings = fuzz.finish()
    finally:
        server.stop()
    print(fuzz.table())
    assert not findings, "\n".join(map(str, findings[:20]))
    assert sum(fuzz.counts.values()) > 150

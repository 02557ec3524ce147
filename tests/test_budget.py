"""What an answer can cost is known before it is generated."""

import json

import pytest
import torch
from serving import ServiceClient

from handlers import budget, jobs

torch.set_num_threads(1)
LONG = {"temperature": 0, "repetition_penalty": 1}
CHAT = {"messages": [{"role": "user", "content": "good morning"}]}
SCORED = {"prompt": [[7] * 60] * 3, "echo": True, "logprobs": 20}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return ServiceClient(tmp_path_factory.mktemp("chat"), "chatlm")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "body, path",
    [
        ({"context": "hello", "n": 1}, ""),
        ({"context": ["\U0001f600" * 9, "\x01" * 20], "n": 1}, ""),
        (CHAT | {"n": 4}, "v1/chat/completions"),
        (CHAT | {"logprobs": True, "top_logprobs": 20}, "v1/chat/completions"),
        (SCORED, "v1/completions"),
        (SCORED | {"n": 4, "stream_options": {"include_usage": True}}, "v1/completions"),
    ],
)
def test_no_answer_is_larger_than_estimated(chat, body, path, stream):
    body = body | LONG | {"max_tokens": 30, "stream": stream}
    estimate = budget.answer_bytes(jobs.JobReader(dict(body), chat.service.model).read(path))
    id = f"estimated {len(chat.got)}"
    chat.send(id, body, path)
    chat.finish(id)
    assert chat.got[id].status == 200
    assert estimate / 20 < len(chat.got[id].text) <= estimate


def test_one_answer_too_large_is_a_400_that_says_how_to_make_it_smaller(tmp_path):
    client = ServiceClient(tmp_path, "lm", max_answer_mb=1)
    body = {"prompt": [[7] * 100] * 10, "echo": True, "logprobs": 20}
    status, answer = client.ask(body, "v1/completions")
    assert status == 400 and "fewer prompts" in answer["error"]["message"]
    assert client.ask(body | {"logprobs": 2}, "v1/completions")[0] == 200


@pytest.mark.parametrize("limit", ["max_answers_mb", "max_java_mb"])
def test_large_answers_together_are_a_503_while_small_ones_go_on(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(budget, "java_bytes", lambda: 0)
    client = ServiceClient(tmp_path, "lm", max_answers_mb=1)
    if limit == "max_java_mb":
        client = ServiceClient(tmp_path, "lm")
        monkeypatch.setattr(budget, "java_bytes", lambda: 2**30)
    large = {"prompt": [[7] * 100] * 3, "echo": True, "logprobs": 20, "max_tokens": 20} | LONG
    for id in ("first", "second", "third"):
        client.send(id, large, "v1/completions")
    client.send("small", {"prompt": "hello", "max_tokens": 5}, "v1/completions")
    client.finish()
    statuses = [client.got[id].status for id in ("first", "second", "third", "small")]
    assert statuses == ([200, 503, 503, 200] if limit == "max_answers_mb" else [503] * 3 + [200])
    assert "too many large answers" in json.loads(client.got["third"].text)["error"]["message"]
    if limit == "max_answers_mb":
        assert client.ask(large, "v1/completions")[0] == 200

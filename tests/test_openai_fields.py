"""What OpenAI's clients send besides what is read: each line of the table in handlers/README.md."""

import json
import re
from typing import NamedTuple

import pytest
import torch
from serving import ROOT, ServiceClient

from handlers.unread import IGNORED, OTHER, UNAVAILABLE

torch.set_num_threads(1)

ROUTES = {
    "v1/completions": {"prompt": "Hi"},
    "v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
}
SETTINGS = {"temperature": 0, "max_tokens": 6}


class Example(NamedTuple):
    """Some fields of a body, and what the table says is done with them."""

    fields: dict
    outcome: str


def table() -> list[Example]:
    text = (ROOT / "handlers" / "README.md").read_text(encoding="utf-8")
    section = text.partition("### What clients send")[2].partition("\n## ")[0]
    examples = []
    for line in section.splitlines():
        if line.startswith("| `"):
            _, cell, outcome, *_ = line.split("|")
            for members in re.findall("`([^`]+)`", cell):
                examples.append(Example(json.loads(f"{{{members}}}"), outcome.strip()))
    return examples


TABLE = table()


def of_outcome(outcome: str) -> list[dict]:
    return [example.fields for example in TABLE if example.outcome == outcome]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return ServiceClient(tmp_path_factory.mktemp("chat"), "chatlm")


def routes_of(fields: dict) -> list[str]:
    return ["v1/chat/completions"] if "messages" in fields else list(ROUTES)


def choice_of(answer: dict) -> tuple[str, str]:
    """The text of the only choice, and why it ended."""
    [choice] = answer["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return text, choice["finish_reason"]


def ignored_by(client: ServiceClient) -> dict[str, int]:
    """How often each name has been counted since the last call."""
    counts: dict[str, int] = {}
    for kind, name, value, labels in client.figures:
        if name == "gptchat_ignored_fields":
            assert kind == "counter" and labels[0] == "chatlm"
            counts[labels[1]] = counts.get(labels[1], 0) + value
    client.figures.clear()
    return counts


@pytest.mark.parametrize("fields", of_outcome("ignored"), ids=json.dumps)
def test_an_ignored_field_changes_nothing_and_is_counted_by_name(chat, fields):
    for path in routes_of(fields):
        expected = chat.ask(ROUTES[path] | SETTINGS, path)[1]
        ignored_by(chat)
        status, answer = chat.ask(ROUTES[path] | SETTINGS | fields, path)
        assert status == 200 and choice_of(answer) == choice_of(expected)
        assert answer["usage"] == expected["usage"]
        (name,) = fields
        if name == "stream_options":
            (name,) = fields[name]
        known = name in IGNORED or name in UNAVAILABLE
        counted = {} if name == "messages" else {name if known else OTHER: 1}
        assert ignored_by(chat) == counted


@pytest.mark.parametrize("fields", of_outcome("400"), ids=json.dumps)
def test_what_would_change_the_answer_and_cannot_be_had_is_a_400_that_names_it(chat, fields):
    for path in routes_of(fields):
        ignored_by(chat)
        status, answer = chat.ask(ROUTES[path] | SETTINGS | fields, path)
        (name,) = fields
        assert status == 400 and answer["error"]["param"] == name
        assert "model" in answer["error"]["message"] or name == "best_of"
        assert ignored_by(chat) == {}


@pytest.mark.parametrize("fields", of_outcome("cut down"), ids=json.dumps)
def test_a_length_that_does_not_fit_is_cut_down(chat, fields):
    n_ctx = chat.service.model.generator.n_ctx
    for path in routes_of(fields):
        never_ends = {"temperature": 0, "logit_bias": {"4": -100}}  # [CLS]
        status, answer = chat.ask(ROUTES[path] | never_ends | fields, path)
        assert status == 200 and choice_of(answer)[1] == "length"
        assert answer["usage"]["total_tokens"] == n_ctx


@pytest.mark.parametrize("fields", of_outcome("used"), ids=json.dumps)
def test_a_used_field_is_taken_and_not_counted_as_ignored(chat, fields):
    for path in routes_of(fields):
        ignored_by(chat)
        status, answer = chat.ask(ROUTES[path] | {"temperature": 0} | fields, path)
        assert status == 200 and len(answer["choices"]) == 1 and ignored_by(chat) == {}
        if "max_completion_tokens" in fields:
            assert answer["usage"]["completion_tokens"] <= fields["max_completion_tokens"]


def test_the_table_has_every_field_that_is_ignored_or_refused():
    ignored = {name for fields in of_outcome("ignored") for name in fields}
    within = {name for fields in of_outcome("ignored") for name in fields.get("stream_options", ())}
    refused = {name for fields in of_outcome("400") for name in fields}
    with_neutral_value = {name for name, one in UNAVAILABLE.items() if one.neutral}
    unknown = {"messages", "stream_options", "anything_else"}
    assert (ignored - unknown) | within == set(IGNORED) | with_neutral_value
    assert refused - {"messages"} == set(UNAVAILABLE)
    assert {example.outcome for example in TABLE} == {"used", "cut down", "ignored", "400"}


def test_names_that_clients_make_up_are_counted_as_one(chat):
    ignored_by(chat)
    made_up = {f"made up {i}": i for i in range(300)}
    options = {"stream_options": {"x\ny": 1}}
    body = ROUTES["v1/completions"] | SETTINGS | made_up | options
    assert chat.ask(body, "v1/completions")[0] == 200
    assert ignored_by(chat) == {OTHER: 1}


def test_the_originals_api_refuses_what_openais_ignores(chat):
    for fields in of_outcome("ignored"):
        status, answer = chat.ask({"context": "a"} | fields)
        assert status == 400 and answer["error"]["param"] in fields


def test_a_dialogue_is_cut_to_half_the_context_for_an_answer_as_long_as_that(chat):
    n_ctx = chat.service.model.generator.n_ctx
    said = ("good morning " * 5).strip()
    messages = [{"role": role, "content": said} for role in ("user", "assistant")] * 8
    body = {"messages": messages[:-1], "temperature": 0, "max_tokens": 300}
    status, answer = chat.ask(body, "v1/chat/completions")
    assert status == 200 and answer["usage"]["prompt_tokens"] <= n_ctx // 2


def test_a_prompt_that_fills_the_context_gets_no_token(chat):
    n_ctx = chat.service.model.generator.n_ctx
    body = {"prompt": [7] * n_ctx, "max_tokens": 16}
    status, answer = chat.ask(body, "v1/completions")
    assert status == 200 and choice_of(answer) == ("", "length")


# Settings of OpenAI's API, end to end


def test_penalties_bias_and_minimum_change_an_answer_as_they_should(chat):
    tokenizer = chat.service.model.generator.tokenizer
    cls, body = (
        tokenizer.cls_id,
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30},
    )

    def ids_of(path="v1/chat/completions", **settings):
        """The ids of an answer, from its log-probabilities' bytes."""
        status, answer = chat.ask(
            body | {"logprobs": True, "temperature": 0, "whole_characters": 0} | settings, path
        )
        assert status == 200, answer
        [choice] = answer["choices"]
        return [tuple(token["bytes"]) for token in choice["logprobs"]["content"]]

    plain = ids_of(logit_bias={str(cls): -100})
    assert len(plain) == 30 and len(set(plain)) < 20  # greedy: it repeats itself
    varied = ids_of(logit_bias={str(cls): -100}, presence_penalty=2, frequency_penalty=2)
    assert len(set(varied)) > len(set(plain))
    word = tokenizer.encode("Hi")[0]
    assert set(ids_of(logit_bias={word: 100, cls: -100})) == {tuple(tokenizer.token_bytes[word])}
    assert ids_of(logit_bias={cls: 100}) == []
    assert len(ids_of(logit_bias={cls: 100}, min_tokens=7)) == 7
    assert len(ids_of(logit_bias={cls: 100}, min_tokens=70)) == 30  # the maximum goes before


# Conversations


def next_turns(client: ServiceClient) -> list[str]:
    """A conversation of three turns, each with all that was said before."""
    messages: list[dict] = []
    said = []
    for text in ("good morning", "where do you live?", "in a small town"):
        messages.append({"role": "user", "content": text})
        body = {"messages": messages, "temperature": 0, "max_tokens": 12}
        answer = client.ask(body, "v1/chat/completions")[1]["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": answer})
        said.append(answer)
    return said


def cached_tokens(client: ServiceClient) -> int:
    return sum(value for _, name, value, _ in client.figures if name == "gptchat_cached_tokens")


def test_a_conversation_is_not_computed_again_and_can_be(tmp_path):
    said, cached = [], []
    for setting in (True, False):
        client = ServiceClient(tmp_path / str(setting), "chatlm", prefix_cache=setting)
        said.append(next_turns(client))
        cached.append(cached_tokens(client))
    assert said[0] == said[1]
    assert cached[0] > 15 and cached[1] == 0

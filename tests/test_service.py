"""The server without TorchServe: what bodies mean, what is answered, and the decode thread."""

import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import wait_until
from handlers.fields import Refusal
from serving import ROOT, ServiceClient

from gptchat.config import ServerSettings
from gptchat.inference.engine import Engine, Request, generate
from gptchat.inference.sampling import SETTINGS, Sampling
from gptchat.inference.text import CharacterFilter
from gptchat.model import pretrained
from handlers import jobs
from handlers.served_model import slots_that_fit

torch.set_num_threads(1)
# with these the model of the tests never ends by itself
LONG = {"temperature": 0, "repetition_penalty": 1}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return ServiceClient(tmp_path_factory.mktemp("chat"), "chatlm")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return ServiceClient(tmp_path_factory.mktemp("lm"), "lm")


def alone(client, input_ids, types, new):
    """Greedy ids of the engine by itself."""
    model, tokenizer, task = pretrained.load_model(client.model)
    suppress = pretrained.never_generated(model.config, tokenizer, task)
    characters = CharacterFilter(tokenizer, model.config.vocab_size)
    engine = Engine(model, 1, suppress=suppress, characters=characters)
    request = Request(
        input_ids,
        types,
        Sampling(temperature=0, max_new_tokens=new),
        stop_ids=[pretrained.stop_id(tokenizer, task)],
    )
    text = tokenizer.decode(generate(engine, [request])[0][0].ids)
    return text.removesuffix("\ufffd")  # a character that the length has cut


@pytest.mark.parametrize(
    "body, path, reason",
    [
        ([1], "", "JSON object"),
        ({}, "", "context"),
        ({"context": 3}, "", "context"),
        ({"context": ["a", 3]}, "", "context"),
        ({"context": "a", "temprature": 1}, "", "temprature"),
        ({"context": "a", "temperature": -1}, "", "temperature"),
        ({"context": "a", "temperature": float("nan")}, "", "temperature"),
        ({"context": "a", "top_k": 1.5}, "", "top_k"),
        ({"context": "a", "top_k": True}, "", "top_k"),
        ({"context": "a", "seed": 10**30}, "", "seed"),
        ({"context": "a", "n": 17}, "", "n is 17"),
        ({"context": "a", "n": 2, "stream": True}, "", "n is 2"),
        ({"context": "a", "max_new_tokens": 129}, "", "0 to 128"),
        ({"context": "a", "repetition_penalty": 0}, "", "repetition"),
        ({"context": "\ud800"}, "", "context"),
        ({"context": "a", "stop": [""]}, "", "stop"),
        ({"context": "a", "bad_words": [1]}, "", "bad"),
        ({"context": "a", "stop": "x" * 201}, "", "200 characters"),
        ({"context": "x" * 10**6}, "", "cannot fit"),
        ({"context": "x " * 80}, "", "last turn"),
        ({"messages": []}, "v1/chat/completions", "messages"),
        ({}, "v1/chat/completions", "message"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "v1/chat/completions", "role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "v1/chat/completions",
            "images",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "tools": [{}]},
            "v1/chat/completions",
            "tools",
        ),
        (
            {
                "messages": [{"role": "user", "content": "a"}],
                "response_format": {"type": "json_object"},
            },
            "v1/chat/completions",
            "format",
        ),
        ({"prompt": [0, 10**6]}, "v1/completions", "prompt"),
        ({"prompt": "a", "logprobs": 99}, "v1/completions", "logprobs"),
        ({"prompt": ["a"] * 65}, "v1/completions", "prompt"),
        ({"prompt": ["a"] * 64, "n": 2}, "v1/completions", "128 answers"),
        ({"prompt": [7] * 129}, "v1/completions", "129 tokens"),
        ({"context": "a", "n": 2, "num_return_sequences": 2}, "", "the same"),
        ({"context": "a", "max_tokens": 2, "max_new_tokens": 2}, "", "the same"),
        ({"context": "a", "user": "u"}, "", "'user' is unknown"),
        ({"context": "a", "logit_bias": {"x": 1}}, "", "token ids below"),
        ({"context": "a", "logit_bias": {"05": 1}}, "", "token ids below"),
        ({"context": "a", "logit_bias": {"9999": 1}}, "", "token ids below"),
        ({"context": "a", "logit_bias": {"5": 101}}, "", "from -100 to 100"),
        ({"context": "a", "logit_bias": {"5": True}}, "", "from -100 to 100"),
        ({"context": "a", "logit_bias": [5]}, "", "from -100 to 100"),
        ({"context": "a", "logit_bias": {str(i): 1 for i in range(301)}}, "", "up to 300"),
        (
            {"prompt": "a", "stream_options": {"include_usage": 1}},
            "v1/completions",
            "include_usage",
        ),
        ({"prompt": "a", "stream_options": [1]}, "v1/completions", "stream_options"),
        ({"prompt": "a", "max_tokens": -1}, "v1/completions", "max_tokens"),
        ({"messages": [{"role": "user"}]}, "v1/completions", "v1/chat/completions takes them"),
        ({"prompt": "a", "max_tokens": 5, "max_new_tokens": "5"}, "v1/completions", "max_new"),
    ],
)
def test_wrong_request_is_a_400_that_says_why(chat, body, path, reason):
    status, answer = chat.ask(body, path)
    assert status == 400 and reason in answer["error"]["message"]
    assert (
        answer["error"]["type"] == "invalid_request_error"
        and "\n" not in answer["error"]["message"]
    )


@pytest.mark.parametrize(
    "body, path", [({"prompt": ["a", ""]}, "v1/completions"), ({"context": ""}, "")]
)
def test_an_empty_text_needs_an_end_token_to_start_from(lm, monkeypatch, body, path):
    generator = lm.service.model.generator
    assert lm.ask(body, path)[0] == 200
    monkeypatch.setattr(generator.tokenizer, "eos_id", -1)
    monkeypatch.setattr(generator, "stop_ids", ())
    status, answer = lm.ask(body, path)
    assert status == 400 and "no [EOS]" in answer["error"]["message"]


def test_other_refusals_have_their_own_status(chat, lm):
    assert chat.ask({}, "v1/nothing")[0] == 404
    assert (
        chat.ask({"model": "gpt-5", "prompt": "a"}, "v1/completions")[1]["error"]["code"]
        == "model_not_found"
    )
    assert (
        chat.ask(bytearray(b"context=a"), **{"content-type": "application/x-www-form-urlencoded"})[
            0
        ]
        == 415
    )
    assert chat.ask(bytearray(b"{bad"))[0] == 400
    assert chat.ask(bytearray(b"[" * 100_000))[0] == 400
    assert chat.ask(bytearray(b"\xff{}"))[0] == 400
    assert lm.ask({"messages": [{"role": "user", "content": "a"}]}, "v1/chat/completions")[0] == 400
    assert lm.ask({"context": ["a", "b"]})[0] == 400
    assert lm.ask(bytearray())[0] == 400


def test_get_gives_the_page_and_the_models(chat):
    assert chat.ask(bytearray()) == (200, "<p>page")
    assert chat.ask(bytearray(), "v1/models")[1]["data"][0]["id"] == "chatlm"
    assert chat.ask(bytearray(), "v1/models/chatlm")[1]["id"] == "chatlm"
    assert chat.ask(bytearray(), "v1/models/other")[0] == 404


def test_header_names_and_parameters_of_the_content_type_are_free(chat):
    chat.send("x", bytearray(b'{"context": "a", "max_tokens": 1}'))
    chat.live["x"] = {"url_path": "", "CONTENT-TYPE": "Application/JSON; charset=utf-8"}
    chat.finish("x")
    assert chat.got["x"].status == 200


def test_original_answer_has_five_candidates_and_the_median_length(chat):
    status, answer = chat.ask({"context": "good morning", "seed": 3})
    output = answer["model_info"]["output"]
    assert status == 200 and len(output) == 5 and answer["request"] == {"context": "good morning"}
    assert answer["response"] == sorted(output, key=len)[2]
    assert (
        answer["model_info"]["prompt_tokens"] > 2
        and len(answer["model_info"]["finish_reason"]) == 5
    )
    assert chat.ask({"context": "good morning", "seed": 3})[1]["model_info"]["output"] == output


def test_settings_not_given_are_those_of_the_terminal_chat_and_neutral_in_openais_api(chat, lm):
    def read(client, body, path=""):
        sampling = (
            jobs.JobReader(body | {"seed": 0, "max_tokens": 9}, client.service.model)
            .read(path)
            .sampling
        )
        return {name: getattr(sampling, name) for name in usual}

    off = {"frequency_penalty": 0, "presence_penalty": 0, "min_tokens": 0, "whole_characters": 1}
    neutral = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1} | off
    small = {"temperature": 0.6, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.15}
    usual = neutral | small
    assert {*usual, "max_new_tokens"} == {*neutral, "max_new_tokens"} == set(SETTINGS)
    for client in (chat, lm):
        assert (
            read(client, {"context": "a"}) == read(client, {"context": "a", "top_k": None}) == usual
        )
        for name, value in neutral.items():  # each one by itself, be it neutral
            assert read(client, {"context": "a", name: value}) == usual | {name: value}
        assert read(client, {"prompt": "a"}, "v1/completions") == neutral
    message = {"role": "user", "content": "a"}
    assert read(chat, {"messages": [message], "top_k": 3}, "v1/chat/completions") == neutral | {
        "top_k": 3
    }
    status, answer = chat.ask({"context": "good morning", "seed": 3})
    assert (
        chat.ask({"context": "good morning", "seed": 3} | usual)[1]["response"]
        == answer["response"]
    )


def test_greedy_answer_equals_the_engine_alone(chat, lm):
    tokenizer, new = chat.service.model.generator.tokenizer, 12
    context = tokenizer.encode("good morning")
    ids, types = [*context, tokenizer.sep_id], [0] * len(context) + [1]
    expected = alone(chat, ids, types, new)
    settings = {"temperature": 0, "repetition_penalty": 1, "max_tokens": new}
    assert chat.ask({"context": "good morning", "n": 1} | settings)[1]["response"] == expected
    message = {"messages": [{"role": "user", "content": "good morning"}]} | settings
    assert (
        chat.ask(message, "v1/chat/completions")[1]["choices"][0]["message"]["content"] == expected
    )
    expected = alone(lm, context, None, new)
    assert lm.ask({"context": "good morning", "n": 1} | settings)[1]["response"] == expected
    assert (
        lm.ask({"prompt": context} | settings, "v1/completions")[1]["choices"][0]["text"]
        == expected
    )


def test_turns_and_beginning_reach_the_prompt(chat):
    served = chat.service.model
    t = served.generator.tokenizer
    job = jobs.JobReader({"context": ["a", "b", "c"], "response": "I "}, served).read("")
    a, b, c, i = (t.encode(text) for text in ("a", "b", "c", "I "))
    assert job.requests[0].input_ids == [*a, *([t.sep_id] + b), *([t.sep_id] + c), t.sep_id, *i]
    assert job.requests[0].token_type_ids == [0] * len(a) + [1] * (1 + len(b)) + [0] * (
        1 + len(c)
    ) + [1] * (1 + len(i))
    status, answer = chat.ask({"context": "a", "response": "I ", "n": 1, "max_tokens": 3})
    assert answer["response"].startswith("I ")


def test_stream_is_the_whole_answer_in_pieces(chat):
    for path, body in (
        ("", {"context": "hello"}),
        ("v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
        ("v1/completions", {"prompt": "hello", "logprobs": 1, "echo": True}),
    ):
        body |= {"seed": 5, "max_tokens": 20, "n": 1}
        whole = chat.ask(body, path)[1]
        streamed = chat.ask(body | {"stream": True}, path)[1]
        events = [
            json.loads(line[6:])
            for line in streamed.split("\n\n")
            if line and line != "data: [DONE]"
        ]
        assert streamed.endswith("data: [DONE]\n\n")
        if not path:
            assert (
                "".join(event.get("token", "") for event in events)
                == whole["response"]
                == events[-1]["response"]
            )
        elif "chat" in path:
            assert (
                "".join(event["choices"][0]["delta"].get("content", "") for event in events)
                == whole["choices"][0]["message"]["content"]
            )
            assert (
                events[0]["choices"][0]["delta"]["role"] == "assistant"
                and events[-1]["choices"][0]["finish_reason"]
            )
        else:
            choice = whole["choices"][0]
            assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]
            tokens = [
                token for event in events for token in event["choices"][0]["logprobs"]["tokens"]
            ]
            assert tokens == choice["logprobs"]["tokens"]


def test_stop_strings_end_and_are_left_out(chat):
    body = {"context": "hello", "temperature": 0, "max_tokens": 30, "n": 1, "whole_characters": 0}
    text = chat.ask(body)[1]["response"]
    stop = re.findall("[a-z]{3}", text)[1]
    for stream in (False, True):
        answer = chat.ask(body | {"stop": stop, "stream": stream})[1]
        answer = json.loads(answer.split("\n\n")[-3][6:]) if stream else answer
        assert answer["response"] == text[: text.index(stop)] and answer["model_info"][
            "finish_reason"
        ] == ["stop"]
    wait_until(lambda: chat.service.loop.engine.idle)


def test_forbidden_words_do_not_come(chat):
    body = {"context": "hello", "temperature": 0, "max_tokens": 30, "n": 1}
    text = chat.ask(body)[1]["response"]
    word = re.findall("[a-z]{2}", text)[0]
    assert word not in chat.ask(body | {"bad_words": [word]})[1]["response"]


def test_echo_with_logprobs_scores_as_the_model_does(lm):
    model, tokenizer, _ = pretrained.load_model(lm.model)
    prompts = [tokenizer.encode("good morning 😀 you"), tokenizer.encode("where")]
    status, answer = lm.ask(
        {"prompt": prompts, "echo": True, "logprobs": 2, "max_tokens": 0}, "v1/completions"
    )
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        scores = model.logits(model.hidden(torch.tensor([ids])))[0].log_softmax(-1)
        expected = scores[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        got = choice["logprobs"]
        assert got["token_logprobs"][0] is None and got["top_logprobs"][0] is None
        torch.testing.assert_close(
            torch.tensor(got["token_logprobs"][1:]), expected, atol=1e-4, rtol=1e-4
        )
        best = [max(top.values()) for top in got["top_logprobs"][1:]]
        torch.testing.assert_close(
            torch.tensor(best), scores[:-1].max(-1).values, atol=1e-4, rtol=1e-4
        )
        assert choice["text"] == tokenizer.decode(ids) and len(got["tokens"]) == len(ids)


def test_leaver_is_dropped_and_its_slot_is_free_by_the_second_step(chat, monkeypatch):
    engine, with_leaver = chat.service.loop.engine, []
    step, cancel = engine.step, engine.cancel

    def watched_step():
        with_leaver.append(sum(row.request_id == number for row in engine.running))
        return step()

    def watched_cancel(request_id, candidate=None):
        with_leaver.clear()
        cancel(request_id, candidate)

    for id in ("leaver", "stayer"):
        chat.send(id, {"context": "hello", "stream": True, "max_tokens": 100} | LONG)
    for _ in range(3):
        chat.round()
    (ticket,) = chat.service.live["leaver"].tickets
    number = ticket.engine_id
    monkeypatch.setattr(engine, "step", watched_step)
    monkeypatch.setattr(engine, "cancel", watched_cancel)
    del chat.live["leaver"]
    chat.finish("stayer")
    assert len(with_leaver) > 10 and not any(with_leaver)
    left = ("counter", "gptchat_requests", 1, ["chatlm", "original", "left"])
    assert left in chat.figures


def test_thread_waits_for_its_clients(chat):
    chat.send("slow", {"context": "hello", "stream": True, "max_tokens": 128} | LONG)
    chat.round()
    time.sleep(0.3)
    row = chat.service.loop.engine.running[0]
    assert len(row.ids) < 30
    del chat.live["slow"]
    chat.send("next", {"context": "a", "max_tokens": 1})
    chat.finish("next")
    wait_until(lambda: not chat.service.loop.engine.live)


def test_full_queue_is_a_503(tmp_path):
    client = ServiceClient(tmp_path, "chatlm", max_requests=3, slots=2)
    for i in range(5):
        client.send(f"r{i}", {"context": "hello", "max_tokens": 5, "n": 1})
    client.finish()
    assert sorted(client.got[f"r{i}"].status for i in range(5)) == [200, 200, 200, 503, 503]
    assert "3 requests (max_requests)" in client.got["r4"].text
    (tmp_path / "draining").touch()
    assert client.ask({"context": "a"})[0] == 503


def test_dead_decode_thread_answers_everyone_and_ends_the_process(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr("handlers.service.os._exit", ended.append)
    client = ServiceClient(tmp_path, "chatlm")
    client.send("stream", {"context": "hello", "stream": True, "max_tokens": 100} | LONG)
    client.send("whole", {"context": "hello", "max_tokens": 100} | LONG)
    client.round()
    monkeypatch.setattr(client.service.loop.engine, "step", lambda: 1 / 0)
    client.finish("stream", "whole", seconds=5)
    assert (
        json.loads(client.got["stream"].text.split("\n\n")[-3][6:])["error"]["type"]
        == "server_error"
    )
    assert json.loads(client.got["whole"].text)["error"]["type"] == "server_error"
    assert client.ask({"context": "a"})[0] == 503
    wait_until(lambda: ended)
    assert ended[0] == 1


def test_an_old_turn_too_long_is_dropped_with_what_is_before_it(chat):
    asked = {"temperature": 0, "max_tokens": 5}
    said = ("user", "x" * 9000), ("assistant", "ok"), ("user", "hi")
    long = [{"role": role, "content": text} for role, text in said]
    answers = [
        chat.ask({"messages": turns} | asked, "v1/chat/completions") for turns in (long, long[1:])
    ]
    assert [status for status, _ in answers] == [200, 200]
    assert (
        answers[0][1]["choices"] == answers[1][1]["choices"]
        and answers[0][1]["usage"] == answers[1][1]["usage"]
    )


@pytest.mark.parametrize("step", ["take", "whole"])
def test_bug_in_one_answer_disturbs_no_other(chat, monkeypatch, step):
    chat.send("bad", {"context": "hello", "stream": True, "max_tokens": 50} | LONG)
    chat.send("good", {"context": "hello", "temperature": 0, "max_tokens": 50, "n": 1})
    chat.round()
    monkeypatch.setattr(chat.service.live["bad"].generation, step, lambda *_: 1 / 0)
    chat.finish("bad", "good")
    assert (
        "internal error" in chat.got["bad"].text and json.loads(chat.got["good"].text)["response"]
    )


def test_refusals_are_one_line(chat):
    with pytest.raises(Refusal, match="is unknown") as error:
        jobs.JobReader({"context": "a", "x\ny": 1}, chat.service.model).read("")
    assert "\n" not in str(error.value)


def test_every_declared_sampling_setting_can_be_given_and_names_itself_when_out_of_range(chat):
    given = {}
    for name, declared in SETTINGS.items():
        low, high = declared.metadata["low"], declared.metadata["high"]
        given[name] = declared.type(low + 0.5 if declared.type is float else min(low + 3, high))
        status, answer = chat.ask({"context": "a", name: low - 1})
        assert (status, answer["error"]["param"]) == (400, name)
        assert answer["error"]["message"].startswith(f"{name} is {low - 1}, wanted a")
        status, answer = chat.ask({"context": "a", name: "much"})
        assert (status, answer["error"]["param"]) == (400, name)
    sampling = jobs.JobReader({"context": "a"} | given, chat.service.model).read("").sampling
    assert {name: getattr(sampling, name) for name in SETTINGS} == given


def test_slots_are_as_many_as_the_memory_for_the_cache_holds():
    config = SimpleNamespace(n_layer=12, n_embd=768, n_positions=1024)  # 72 MB a slot
    for cache_mb, slots in ((4096, 32), (720, 10), (719, 9), (1, 1)):
        assert slots_that_fit(config, ServerSettings(cache_mb=cache_mb)) == slots


def test_candidates_are_as_many_as_slots_at_most(tmp_path):
    client = ServiceClient(tmp_path, "chatlm", slots=2)
    assert client.service.model.settings.slots == client.service.model.generator.engine.slots == 2
    status, answer = client.ask({"context": "a", "max_tokens": 2})
    assert status == 200 and len(answer["model_info"]["output"]) == 2
    status, answer = client.ask({"context": "a", "n": 3})
    assert status == 400 and "1 to 2" in answer["error"]["message"]


def test_service_imports_neither_torchserve_nor_training_nor_commands():
    program = """
import sys
sys.modules["ts"] = None  # importing it is an error
import handlers.answers, handlers.jobs, handlers.loop, handlers.service
print(*sorted(name for name in sys.modules if name.startswith("gptchat.")))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    loaded = done.stdout.split()
    assert "gptchat.inference.generate" in loaded
    commands = ("train", "evaluate", "chat", "serve", "bench")
    above = tuple(f"gptchat.{name}" for name in commands)
    assert not [name for name in loaded if name.startswith(above)]


def test_chat_log_probabilities_list_each_token_with_its_bytes_and_the_best(chat):
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        "max_tokens": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "whole_characters": 0,
    }
    status, answer = chat.ask(body | LONG, "v1/chat/completions")
    choice = answer["choices"][0]
    content = choice["logprobs"]["content"]
    assert status == 200 and len(content) == answer["usage"]["completion_tokens"] == 3
    raw = bytes(byte for token in content for byte in token["bytes"])
    assert raw.decode("utf-8", "replace").startswith(choice["message"]["content"].rstrip("\ufffd"))
    for token in content:
        best = token["top_logprobs"]
        assert len(best) == 2 and best[0]["logprob"] >= best[1]["logprob"]
        assert best[0] | {"top_logprobs": best} == token  # greedy


@pytest.mark.parametrize("path", ["v1/completions", "v1/chat/completions"])
def test_another_models_name_is_a_404_that_names_this_one(chat, path):
    messages = [{"role": "user", "content": "a"}]
    body = {"model": "gpt-5", "messages": messages}
    status, answer = chat.ask(body, path)
    assert status == 404 and answer["error"]["code"] == "model_not_found"
    assert answer["error"]["message"] == "no model 'gpt-5': this is chatlm"


def test_usage_is_asked_for_with_true_or_false_only(lm):
    body = {"prompt": "good", "max_tokens": 2, "stream": True}
    for options, last_event_has_usage in (({"include_usage": True}, True), ({}, False)):
        text = lm.ask(body | {"stream_options": options}, "v1/completions")[1]
        *_, last, end = text.rstrip("\n").split("\n\n")
        assert end == "data: [DONE]"
        assert ("usage" in json.loads(last[6:])) == last_event_has_usage
    body["stream_options"] = {"include_usage": "yes"}
    status, answer = lm.ask(body, "v1/completions")
    assert status == 400 and answer["error"]["param"] == "stream_options"


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:8080", "127.0.0.1:8080", "[::1]:8080", "10.1.2.3", "a.example"]
)
def test_own_hosts_are_answered(tmp_path, host):
    client = ServiceClient(tmp_path, "chatlm", hosts=("A.example",))
    assert client.ask(bytearray(), "v1/models", Host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example:8080", "localhost.evil.example", "", "[", "a@b"])
@pytest.mark.parametrize("body", [bytearray(), {"context": "a"}])
def test_another_host_is_refused_so_that_no_rebound_name_gets_in(chat, host, body):
    status, answer = chat.ask(body, host=host)
    assert status == 403 and "`hosts`" in answer["error"]["message"]

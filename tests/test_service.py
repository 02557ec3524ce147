"""The server without TorchServe: rounds, leavers, failures, refusals, and the original's API."""

import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import wait_until
from serving import ROOT, ServiceClient

from gptchat.config import ServerSettings
from gptchat.inference.engine import Engine, Request, generate
from gptchat.inference.sampling import SETTINGS, Sampling
from gptchat.inference.text import CharacterFilter
from gptchat.model import pretrained
from gptchat.model.pretrained import TRAINED_HERE
from handlers import routes
from handlers.served_model import slots_that_fit

torch.set_num_threads(1)
# with these the model of the tests never ends by itself
LONG = {"temperature": 0, "repetition_penalty": 1}
CHAT, TEXT = "v1/chat/completions", "v1/completions"


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return ServiceClient(tmp_path_factory.mktemp("chat"), "chatlm")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return ServiceClient(tmp_path_factory.mktemp("lm"), "lm")


def alone(client, input_ids, types, new):
    """Greedy text of the engine by itself."""
    model, tokenizer, task = pretrained.load_model(client.model)
    suppress = pretrained.never_generated(model.config, tokenizer, task)
    characters = CharacterFilter(tokenizer, model.config.vocab_size)
    engine = Engine(model, 1, suppress=suppress, characters=characters)
    sampling = Sampling(temperature=0, max_new_tokens=new)
    stop_ids = pretrained.stop_ids(model.config, tokenizer, task)
    request = Request(input_ids, types, sampling, stop_ids=stop_ids)
    text = tokenizer.decode(generate(engine, [request])[0][0].ids)
    return text.removesuffix("\ufffd")  # a character that the length has cut


@pytest.mark.parametrize(
    "body, path, reason",
    [
        ([1], "", "the body is [1]"),
        (None, "", "the body is null"),
        (bytearray(b"[" * 100_000), "", "not JSON"),
        (bytearray(b"\xff{}"), "", "not JSON"),
        ({}, "", "`context`"),
        ({"context": ["a", 3]}, "", "context[1] is 3: wanted `str`"),
        ({"context": "a", "temprature": 1}, "", "'temprature' is unknown"),
        ({"context": "a", "x\ny": 1}, "", "is unknown"),
        ({"context": "a", "temperature": float("nan")}, "", "temperature is nan"),
        ({"context": "a", "n": 17}, "", "n is 17: wanted `int` <= 16"),
        ({"context": "a", "n": 2, "stream": True}, "", "n is 2"),
        ({"context": "a", "max_new_tokens": 129}, "", "max_new_tokens is 129"),
        ({"context": "a \ud800"}, "", "context holds '\\ud800', half of a surrogate pair"),
        ({"context": "a", "stop": "x" * 201}, "", "stop is 'xxx"),
        ({"context": "a", "bad_words": ["b", ""]}, "", "bad_words[1] is ''"),
        ({"context": ["", ""]}, "", "no text"),
        ({"context": "a", "n": 2, "num_return_sequences": 2}, "", "the same"),
        ({"context": "a", "logit_bias": {"05": 1}}, "", "logit_bias is {'05': 1}"),
        ({"context": "a", "logit_bias": {"9999": 1}}, "", "logit_bias names token 9999"),
        ({"context": "a", "logit_bias": {"5": 101}}, "", "logit_bias is {'5': 101}"),
        ({"messages": []}, CHAT, "messages is []"),
        ({"messages": [{"role": "user", "content": ""}]}, CHAT, "no text"),
        ({"messages": [{"role": "tool", "content": "a"}]}, CHAT, "messages[0].role is 'tool'"),
        ({"messages": [{"role": "user"}]}, CHAT, "messages[0].content is None"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            CHAT,
            "messages[0].content[0] is {'type': 'image_url'}",
        ),
        ({"messages": [{"role": "user"}]}, TEXT, "v1/chat/completions takes them"),
        ({"prompt": [0, 10**6]}, TEXT, "prompt has the id 1000000"),
        ({"prompt": ["a", 7]}, TEXT, "prompt[1] is 7, among texts"),
        ({"prompt": "a", "logprobs": 99}, TEXT, "logprobs is 99"),
        ({"prompt": ["a"] * 33, "n": 2}, TEXT, "66 answers"),
        ({"prompt": "a", "stream_options": {"include_usage": 1}}, TEXT, "include_usage is 1"),
        ({"prompt": "a", "max_tokens": 5, "max_new_tokens": "5"}, TEXT, "max_new_tokens is '5'"),
    ],
)
def test_wrong_request_is_a_400_that_says_where_what_and_what_is_wanted(chat, body, path, reason):
    status, answer = chat.ask(body, path)
    assert status == 400 and reason in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert "\n" not in answer["error"]["message"]


@pytest.mark.parametrize(
    "body, path",
    [
        ({"context": "x" * 10**6}, ""),
        ({"context": "x " * 80}, ""),
        ({"prompt": [7] * 129}, TEXT),
        ({"messages": [{"role": "user", "content": "x " * 80}]}, CHAT),
    ],
)
def test_a_prompt_too_long_is_refused_in_the_words_that_clients_look_for(chat, body, path):
    status, answer = chat.ask(body, path)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    words = "This model's maximum context length is 128 tokens and the prompt is too long: "
    assert answer["error"]["message"].startswith(words)


@pytest.mark.parametrize("body, path", [({"prompt": ["a", ""]}, TEXT), ({"context": ""}, "")])
def test_an_empty_text_needs_an_end_token_to_start_from(lm, monkeypatch, body, path):
    generator = lm.service.model.generator
    assert lm.ask(body, path)[0] == 200
    monkeypatch.setattr(generator.tokenizer, "eos_id", -1)
    monkeypatch.setattr(generator, "stop_ids", ())
    status, answer = lm.ask(body, path)
    assert status == 400 and "no [EOS]" in answer["error"]["message"]


def test_other_refusals_have_their_own_status(chat, lm):
    for body in ({"a": 1}, bytearray()):
        status, answer = chat.ask(body, "v1/nothing")
        assert status == 404 and "wanted one of v1/completions, " in answer["error"]["message"]
    status, answer = chat.ask(bytearray(), CHAT)  # GET of what is there for POST
    assert status == 400 and "wanted a JSON object" in answer["error"]["message"]
    assert chat.ask(bytearray(), "v1/models/other")[0] == 404
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert chat.ask(None, **form)[0] == chat.ask(bytearray(b"context=a"), **form)[0] == 415
    status, answer = chat.ask(bytearray(b"\x1f\x8b..."), **{"Content-Encoding": "gzip"})
    assert status == 415 and "gzip" in answer["error"]["message"]
    assert lm.ask({"messages": [{"role": "user", "content": "a"}]}, CHAT)[0] == 400
    assert lm.ask({"context": ["a", "b"]})[0] == lm.ask(bytearray())[0] == 400


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_another_models_name_is_a_404_that_names_this_one(chat, path):
    status, answer = chat.ask({"model": "gpt-5"}, path)
    assert status == 404 and answer["error"]["code"] == "model_not_found"
    assert answer["error"]["message"] == "no model 'gpt-5': this is chatlm"


def test_get_gives_the_page_and_the_models(chat):
    assert chat.ask(bytearray()) == (200, "<p>page")
    assert chat.ask(bytearray(), "v1/models")[1]["data"][0]["id"] == "chatlm"
    assert chat.ask(bytearray(), "v1/models/chatlm")[1]["id"] == "chatlm"


def test_header_names_and_parameters_of_the_content_type_are_free(chat):
    chat.send("x", bytearray(b'{"context": "a", "max_tokens": 1}'))
    chat.live["x"] = {"url_path": "", "CONTENT-TYPE": "Application/JSON; charset=utf-8"}
    chat.finish("x")
    assert chat.got["x"].status == 200


@pytest.mark.parametrize("host", ["localhost", "LocalHost:8080", "[::1]:8080", "a.example"])
def test_own_hosts_are_answered(tmp_path, host):
    client = ServiceClient(tmp_path, "chatlm", hosts=("A.example",))
    assert client.ask(bytearray(), "v1/models", Host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example:8080", "localhost.evil.example", "", "[", "a@b"])
def test_another_host_is_refused_so_that_no_rebound_name_gets_in(chat, host):
    for body in (bytearray(), {"context": "a"}):
        status, answer = chat.ask(body, host=host)
        assert status == 403 and "`hosts`" in answer["error"]["message"]


# --- the original's API


def test_original_answer_has_five_candidates_and_the_median_length(chat):
    status, answer = chat.ask({"context": "good morning", "seed": 3})
    output = answer["model_info"]["output"]
    assert status == 200 and len(output) == 5 and answer["request"] == {"context": "good morning"}
    assert answer["response"] == sorted(output, key=len)[2]
    assert len(answer["model_info"]["finish_reason"]) == 5
    assert chat.ask({"context": "good morning", "seed": 3})[1]["model_info"]["output"] == output


@pytest.mark.parametrize("seed", [{}, {"seed": -1}, {"seed": None}])
def test_no_seed_and_minus_one_are_another_seed_each_time(chat, seed):
    infos = [chat.ask({"context": "a"} | seed)[1]["model_info"] for _ in range(2)]
    assert infos[0]["seed"] != infos[1]["seed"] and infos[0]["seed"] >= 0
    assert infos[0]["output"] != infos[1]["output"]


def test_settings_not_given_are_the_models_own(chat):
    usual = {name: getattr(Sampling(), name) for name in SETTINGS if name != "max_new_tokens"}
    usual |= TRAINED_HERE.sampling
    message = {"messages": [{"role": "user", "content": "a"}]}
    for path, body in (("", {"context": "a"}), (TEXT, {"prompt": "a"}), (CHAT, message)):
        for given in ({}, {"top_k": None}, {"top_k": 3, "min_p": 0.5}, {"temperature": 1}):
            sampling = sampling_of(chat, body | given, path)
            chosen = {name: value for name, value in given.items() if value is not None}
            assert {name: getattr(sampling, name) for name in usual} == usual | chosen


def sampling_of(client, body, path="", number=0):
    """The settings that a body asks for."""
    generation = client.service.routes.post(path, body, "id", [])
    return generation.requests[number].sampling


def test_every_declared_sampling_setting_can_be_given_and_names_itself_when_out_of_range(chat):
    given = {}
    for name, declared in SETTINGS.items():
        low, high = declared.rules["min"], declared.rules.get("max", 10**9)
        given[name] = declared.type(low + 0.5 if declared.type is float else min(low + 3, high))
        for wrong in (low - 1, "much"):
            status, answer = chat.ask({"context": "a", name: wrong})
            assert (status, answer["error"]["param"]) == (400, name)
            assert answer["error"]["message"].startswith(f"{name} is {wrong!r}: wanted ")
    sampling = sampling_of(chat, {"context": "a"} | given)
    assert {name: getattr(sampling, name) for name in SETTINGS} == given


def test_greedy_answer_equals_the_engine_alone(chat, lm):
    tokenizer, new = chat.service.model.generator.tokenizer, 12
    context = tokenizer.encode("good morning")
    ids, types = [*context, tokenizer.sep_id], [0] * len(context) + [1]
    expected = alone(chat, ids, types, new)
    settings = {"temperature": 0, "repetition_penalty": 1, "max_tokens": new}
    assert chat.ask({"context": "good morning", "n": 1} | settings)[1]["response"] == expected
    message = {"messages": [{"role": "user", "content": "good morning"}]} | settings
    assert chat.ask(message, CHAT)[1]["choices"][0]["message"]["content"] == expected
    expected = alone(lm, context, None, new)
    assert lm.ask({"context": "good morning", "n": 1} | settings)[1]["response"] == expected
    assert lm.ask({"prompt": context} | settings, TEXT)[1]["choices"][0]["text"] == expected


def test_turns_and_beginning_reach_the_prompt(chat):
    t = chat.service.model.generator.tokenizer
    body = {"context": ["a", "b", "c"], "response": "I ", "n": 1, "max_tokens": 3}
    [request] = chat.service.routes.post("", body, "id", []).requests
    a, b, c, i = (t.encode(text) for text in ("a", "b", "c", "I "))
    assert request.input_ids == [*a, *([t.sep_id] + b), *([t.sep_id] + c), t.sep_id, *i]
    types = [0] * len(a) + [1] * (1 + len(b)) + [0] * (1 + len(c)) + [1] * (1 + len(i))
    assert request.token_type_ids == types
    assert chat.ask(body)[1]["response"].startswith("I ")


def test_stop_strings_end_and_are_left_out(chat):
    body = {"context": "hello", "temperature": 0, "max_tokens": 30, "n": 1, "whole_characters": 0}
    text = chat.ask(body)[1]["response"]
    stop = re.findall("[a-z]{3}", text)[1]
    for stream in (False, True):
        answer = chat.ask(body | {"stop": stop, "stream": stream})[1]
        answer = json.loads(answer.split("\n\n")[-3][6:]) if stream else answer
        assert answer["response"] == text[: text.index(stop)]
        assert answer["model_info"]["finish_reason"] == ["stop"]
    wait_until(lambda: chat.service.loop.engine.idle)


def test_forbidden_words_do_not_come(chat):
    body = {"context": "hello", "temperature": 0, "max_tokens": 30, "n": 1}
    text = chat.ask(body)[1]["response"]
    word = re.findall("[a-z]{2}", text)[0]
    assert word not in chat.ask(body | {"bad_words": [word]})[1]["response"]


# --- rounds


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
    event = json.loads(client.got["stream"].text.split("\n\n")[-3][6:])
    for answer in (event, json.loads(client.got["whole"].text)):
        assert answer["error"]["type"] == "server_error"
    assert client.ask({"context": "a"})[0] == 503
    wait_until(lambda: ended)
    assert ended[0] == 1


@pytest.mark.parametrize("step", ["take", "whole"])
def test_bug_in_one_answer_disturbs_no_other(chat, monkeypatch, step):
    chat.send("bad", {"context": "hello", "stream": True, "max_tokens": 50} | LONG)
    chat.send("good", {"context": "hello", "temperature": 0, "max_tokens": 50, "n": 1})
    chat.round()
    monkeypatch.setattr(chat.service.live["bad"].generation, step, lambda *_: 1 / 0)
    chat.finish("bad", "good")
    assert "internal error" in chat.got["bad"].text
    assert json.loads(chat.got["good"].text)["response"]


def test_candidates_are_as_many_as_slots_at_most(tmp_path):
    client = ServiceClient(tmp_path, "chatlm", slots=2)
    status, answer = client.ask({"context": "a", "max_tokens": 2})
    assert status == 200 and len(answer["model_info"]["output"]) == 2
    status, answer = client.ask({"context": "a", "n": 3})
    assert status == 400 and "`int` <= 2" in answer["error"]["message"]


def test_slots_are_as_many_as_the_memory_for_the_cache_holds():
    config = SimpleNamespace(n_layer=12, n_embd=768, n_positions=1024)  # 72 MB a slot
    for cache_mb, slots in ((4096, 32), (720, 10), (719, 9), (1, 1)):
        assert slots_that_fit(config, ServerSettings(cache_mb=cache_mb)) == slots


def test_service_imports_neither_torchserve_nor_training_nor_commands():
    program = """
import sys
sys.modules["ts"] = None  # importing it is an error
import handlers.service
print(*sorted(name for name in sys.modules if name.startswith("gptchat.")))
"""
    command = [sys.executable, "-c", program]
    options = {"capture_output": True, "text": True, "check": True, "timeout": 300}
    loaded = subprocess.run(command, cwd=ROOT, **options).stdout.split()
    assert "gptchat.inference.generate" in loaded
    above = tuple(f"gptchat.{name}" for name in ("train", "evaluate", "chat", "serve", "bench"))
    assert not [name for name in loaded if name.startswith(above)]


# --- the size of answers

SCORED = {"prompt": [[7] * 60] * 3, "echo": True, "logprobs": 20}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "body, path",
    [
        ({"context": ["\U0001f600" * 9, "\x01" * 20], "n": 1}, ""),
        ({"messages": [{"role": "user", "content": "hi"}], "n": 4}, CHAT),
        (SCORED | {"n": 4, "stream_options": {"include_usage": True}}, TEXT),
    ],
)
def test_no_answer_is_larger_than_estimated(chat, body, path, stream):
    body = body | LONG | {"max_tokens": 30, "stream": stream}
    estimate = routes.answer_bytes(chat.service.routes.post(path, body, "id", []))
    id = f"estimated {len(chat.got)}"
    chat.send(id, body, path)
    chat.finish(id)
    assert chat.got[id].status == 200
    assert estimate / 20 < len(chat.got[id].text) <= estimate


def test_one_answer_too_large_is_a_400_that_says_how_to_make_it_smaller(chat, monkeypatch):
    monkeypatch.setattr(routes, "LARGEST_ANSWER", 2**20)
    body = {"prompt": [[7] * 100] * 10, "echo": True, "logprobs": 20}
    status, answer = chat.ask(body, TEXT)
    assert status == 400 and "fewer prompts" in answer["error"]["message"]
    assert chat.ask(body | {"logprobs": 2}, TEXT)[0] == 200


@pytest.mark.parametrize("held, statuses", [(0, [200, 503, 503, 200]), (2**20, [503] * 3 + [200])])
def test_large_answers_wait_while_small_ones_go_on(chat, monkeypatch, held, statuses):
    """What other live requests may become counts, and what Java holds."""
    monkeypatch.setattr(routes, "LIVE_ANSWERS", 2**20)
    monkeypatch.setattr(routes, "JAVA_MEMORY", 2**20)
    monkeypatch.setattr(routes, "java_bytes", lambda: held)
    large = {"prompt": [[7] * 100] * 3, "echo": True, "logprobs": 20, "max_tokens": 20} | LONG
    for id in ("first", "second", "third"):
        chat.send(id, large, TEXT)
    chat.send("small", {"prompt": "hello", "max_tokens": 5}, TEXT)
    chat.finish()
    assert [chat.got[id].status for id in ("first", "second", "third", "small")] == statuses
    message = json.loads(chat.got["third"].text)["error"]["message"]
    assert "too many large answers" in message

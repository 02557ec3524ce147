"""The server whole: the launcher, a real TorchServe, real clients."""

import functools
import json
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
import torch
import transformers
from serving import Server, configs, tiny_model

from gptchat.config import ServerSettings
from gptchat.inference.engine import generate
from gptchat.inference.generate import TextGenerator
from gptchat.model import pretrained
from handlers.routes import Routes
from handlers.served_model import ServedModel

pytestmark = pytest.mark.server
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "chatlm": tiny_model(folder / "chatlm", "chatlm", n_embd=128, n_layer=4),
        "lm": tiny_model(folder / "lm", "lm", n_embd=128, n_layer=4, seed=1),
    }


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    server = Server(folder / "run", models, "--configs", str(configs(folder / "configs", slots=16)))
    yield server.wait_until_ready()
    server.stop()


@pytest.fixture(scope="module")
def reference(models):
    """name -> function that answers a body by the engine alone."""

    def build(name):
        generator = TextGenerator(*pretrained.load_model(models[name]), slots=16)
        routes = Routes(ServedModel(name, generator, ServerSettings()), "")

        def answer(path, body):
            requests = routes.post(path, dict(body), "", []).requests
            return [
                generator.tokenizer.decode(candidate.ids)
                for candidates in generate(generator.engine, requests)
                for candidate in candidates
            ]

        return answer

    return {name: build(name) for name in models}


def client_of(server, name="chatlm"):
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/predictions/{name}/1.0/v1",
        api_key="-",
        max_retries=0,
    )


def gauge(server, name):
    return sum(
        float(value)
        for value in re.findall(rf"^gptchat_{name}{{.*}} (\S+)$", server.metrics(), re.M)
    )


def eventually(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_stream_arrives_in_pieces_the_first_of_them_at_once(server):
    body = {
        "context": "hello",
        "stream": True,
        "max_new_tokens": 100,
        "temperature": 1.5,
        "seed": 1,
    }
    events = server.events("chatlm", body)
    times = [at for at, event in events if "token" in event]
    new = events[-1][1]["model_info"]["completion_tokens"][0]
    assert new > 20 and len(times) > 3 and times[0] < 0.5 * times[-1]
    assert "".join(event.get("token", "") for _, event in events) == events[-1][1]["response"]


def test_openai_client_completes_a_chat(server, reference):
    client = client_of(server)
    assert [model.id for model in client.models.list()] == ["chatlm"]
    assert client.models.retrieve("chatlm").id == "chatlm"
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]
    asked = {"model": "chatlm", "messages": messages, "max_tokens": 10, "temperature": 0}
    expected = reference["chatlm"]("v1/chat/completions", asked)[0]
    besides = {
        "reasoning_effort": "low",
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "extra_body": {"cache_prompt": True, "typical_p": 1, "of_no_server": [1]},
    }
    create = client.chat.completions.create
    answer = create(**asked, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == expected
    assert answer.usage.completion_tokens == len(answer.choices[0].logprobs.content)
    assert all(len(token.top_logprobs) == 2 for token in answer.choices[0].logprobs.content)
    options = {"include_usage": True, "include_obfuscation": False}
    *chunks, last = create(**asked | besides, stream=True, stream_options=options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason
    assert last.usage == answer.usage
    two = create(**asked | {"temperature": 1}, n=2, seed=1, stop=["e"])
    assert [choice.index for choice in two.choices] == [0, 1]
    assert not any("e" in choice.message.content for choice in two.choices)
    assert "of_no_server" not in server.metrics() + server.log.read_text()


def test_openai_client_completes_texts(server, reference):
    client = client_of(server, "lm")
    prompts = ["where do", "good", "good"]
    arguments = {"model": "lm", "prompt": prompts, "max_tokens": 8, "seed": 1}
    expected = reference["lm"]("v1/completions", arguments)
    answer = client.completions.create(**arguments)
    assert [choice.text for choice in answer.choices] == expected
    assert expected[1] != expected[2]  # each prompt draws its own noise
    texts = [""] * 3
    for chunk in client.completions.create(**arguments, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == expected
    seeds = {"seed": -1, "temperature": 2, "max_tokens": 20}
    drawn = [client.completions.create(**arguments | seeds).choices[0].text for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_openai_client_gets_offsets_behind_text_that_is_held_back(server):
    bias = {str(ord("x") - ord("!") + 6): 100}  # the tokenizer's id of "x"
    answer = client_of(server, "lm").completions.create(
        model="lm", prompt="A", max_tokens=4, logprobs=0, temperature=0, logit_bias=bias, stop="xz"
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["x"] * 4 and logprobs.text_offset == [0, 1, 2, 3]


def test_openai_client_continues_the_assistants_message(server):
    body = {"context": "hello", "response": "I am", "temperature": 0, "n": 1, "max_tokens": 9}
    status, answer = server.post("chatlm", body | {"repetition_penalty": 1})
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "I am"}]
    continued = client_of(server).chat.completions.create(
        model="chatlm", messages=said, temperature=0, max_tokens=9
    )
    assert "I am" + continued.choices[0].message.content == answer["response"]


def test_openai_clients_conversations_share_what_was_computed(server, reference):
    """Four conversations at once, each turn with all that was said; texts as without the cache."""
    client = client_of(server)

    def talk(number):
        messages = [{"role": "system", "content": "Be kind, and brief."}]
        n_prompt = 0
        for text in ("hello", "where do you live?", "in a small town?"):
            messages.append({"role": "user", "content": f"{text} {number}"})
            asked = {"messages": list(messages), "max_tokens": 8, "temperature": 0}
            answer = client.chat.completions.create(model="chatlm", **asked)
            text = answer.choices[0].message.content
            n_prompt += answer.usage.prompt_tokens
            talks.append((asked, text))
            messages.append({"role": "assistant", "content": text})
        return n_prompt

    talks = []
    before = gauge(server, "cached_tokens")
    with ThreadPoolExecutor(4) as pool:
        n_prompt = sum(pool.map(talk, range(4)))
    for asked, text in talks:
        assert text == reference["chatlm"]("v1/chat/completions", asked)[0]
    eventually(lambda: gauge(server, "cached_tokens") - before > n_prompt / 3)


def test_openai_client_gets_its_errors(server):
    client = client_of(server)
    messages = [{"role": "user", "content": "a"}]
    create = client.chat.completions.create
    for wrong in (
        {"temperature": -1},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"response_format": {"type": "json_object"}},
        {"extra_body": {"guided_regex": "a+"}},
    ):
        name = next(iter(wrong.get("extra_body", wrong)))
        with pytest.raises(openai.BadRequestError, match=name) as error:
            create(**{"model": "chatlm", "messages": messages} | wrong)
        assert error.value.param == name and error.value.type == "invalid_request_error"
    with pytest.raises(
        openai.BadRequestError, match="maximum context length is 128 tokens"
    ) as error:
        create(model="chatlm", messages=[{"role": "user", "content": "x " * 100}])
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="this is chatlm"):
        create(model="gpt-5", messages=messages)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="chatlm", input="a")


def test_refused_bodies(server):
    assert (
        server.post(
            "chatlm", b"context=hi", headers={"content-type": "application/x-www-form-urlencoded"}
        )[0]
        == 415
    )
    assert (
        server.post("chatlm", b'{"context": "hi"}', headers={"content-type": "text/plain"})[0]
        == 415
    )
    assert server.post("chatlm", b"{bad")[0] == 400
    status, answer = server.post("chatlm", {"context": "x" * 2_000_000})
    assert status == 413
    _, response = server.open("chatlm", method="GET")
    assert (
        response.headers["content-type"].startswith("text/html")
        and b"<!doctype html>" in response.read()
    )
    assert "access-control-allow-origin" not in {name.lower() for name in response.headers}


def test_lm_eval_scores_as_through_transformers(server, models, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    for key in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(key, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    questions = [
        ("where do you live?", [" in a small town", " thank you", " 😀"], 0),
        ("good morning, how are", [" you", " we"], 0),
    ]
    (tmp_path / "task.jsonl").write_text(
        "\n".join(json.dumps({"q": q, "c": c, "a": a}) for q, c, a in questions * 2)
    )
    task = {
        "task": "small_talk",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "task.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "a",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    result = lm_eval.simple_evaluate(
        "local-completions",
        model_args={
            "model": "lm",
            "base_url": f"http://127.0.0.1:{server.port}/predictions/lm/1.0/v1/completions",
            "max_length": 128,
            "tokenizer_backend": "huggingface",
            "tokenizer": str(models["lm"]),
            "num_concurrent": 4,
            "batch_size": 2,
        },
        tasks=[task],
        log_samples=True,
        bootstrap_iters=0,
    )
    right = 0
    for sample in result["samples"]["small_talk"]:
        theirs = [
            loglikelihood(models["lm"], *arguments["arg"])
            if isinstance(arguments, dict)
            else loglikelihood(models["lm"], *arguments)
            for arguments in sample["arguments"]
        ]
        for (ours, greedy), (expected, is_greedy) in zip(
            sample["filtered_resps"], theirs, strict=True
        ):
            assert float(ours) == pytest.approx(expected, abs=1e-3) and str(greedy) == str(
                is_greedy
            )
        right += max(range(len(theirs)), key=lambda i: theirs[i][0]) == sample["target"]
    assert result["results"]["small_talk"]["acc,none"] == right / len(
        result["samples"]["small_talk"]
    )


@functools.cache
def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder
    ).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def loglikelihood(folder, context, continuation):
    """Of the continuation, by transformers on the directory; and whether it is the greedy one."""
    model, tokenizer = theirs(folder)
    ids, first = tokenizer(context + continuation).input_ids, len(tokenizer(context).input_ids)
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0, first - 1 : -1].log_softmax(-1)
    wanted = torch.tensor(ids[first:])
    return scores.gather(1, wanted[:, None]).sum().item(), bool((scores.argmax(-1) == wanted).all())


def ragged(server, reference, number):
    """One client of the crowd, its kind by its number; what went wrong, or None."""
    name = ("chatlm", "lm")[number % 2]
    text = "good morning how are you today in town"[: 3 + number * 7 % 36]
    settings = {"temperature": 0, "n": 1, "max_tokens": 3 + number * 5 % 40}
    kind = number % 6
    if kind == 0:
        status, answer = server.post(name, {"context": text, "temperature": "hot"})
        return None if status == 400 and "temperature" in answer["error"]["message"] else answer
    if kind == 1:
        connection, response = server.open(
            name, {"context": text, "stream": True, "max_tokens": 80, "temperature": 2}
        )
        response.read1(10)
        response.close()
        connection.close()
        return None
    body = {"context": text} | settings
    if kind == 2:
        expected = reference[name]("", body)[0]
        events = server.events(name, body | {"stream": True})
        return None if events[-1][1]["response"] == expected else events
    if kind == 3:
        path, body = "v1/completions", {"prompt": text} | settings
        status, answer = server.post(f"{name}/1.0/{path}", body)
        return None if answer["choices"][0]["text"] == reference[name](path, body)[0] else answer
    if kind == 4 and name == "chatlm":
        path, body = (
            "v1/chat/completions",
            {"messages": [{"role": "user", "content": text}]} | settings,
        )
        events = server.events(f"{name}/1.0/{path}", body | {"stream": True})
        got = "".join(event["choices"][0]["delta"].get("content", "") for _, event in events)
        return None if got == reference[name](path, body)[0] else events
    status, answer = server.post(name, body)
    return None if answer.get("response") == reference[name]("", body)[0] else answer


def test_64_ragged_clients_at_once(server, reference):
    memo, lock = {}, threading.Lock()

    def known(name):
        def answer(path, body):
            with lock:  # the reference engine is for one thread
                key = name, path, json.dumps(body)
                memo[key] = memo.get(key) or reference[name](path, dict(body))
                return memo[key]

        return answer

    with ThreadPoolExecutor(64) as pool:
        wrong = list(
            pool.map(
                lambda number: ragged(server, {name: known(name) for name in reference}, number),
                range(128),
            )
        )
    assert [item for item in wrong if item] == []
    eventually(
        lambda: (
            gauge(server, "live_requests") == 0
            or server.post("chatlm", {"context": "a", "max_tokens": 1})
            and server.post("lm", {"context": "a", "max_tokens": 1}) is None
        )
    )
    assert gauge(server, "live_slots") == gauge(server, "queued") == 0


def test_metrics_and_log_tell_figures_and_no_text(server):
    server.post("chatlm", {"context": "Zanzibar", "max_new_tokens": 3})
    eventually(lambda: "chatlm original 200" in server.log.read_text())
    assert "Zanzibar" not in server.log.read_text()
    text = server.metrics()
    labels = 'ModelName="chatlm",Kind="original",Result="200",Hostname=".*",?'
    assert re.search(rf"gptchat_requests\{{{labels}\}} [1-9]", text)
    for name in (
        "prompt_tokens",
        "generated_tokens",
        "first_token_seconds_count",
        "token_seconds_count",
        "queued",
    ):
        assert f"gptchat_{name}{{" in text


def test_killed_worker_hangs_nobody_and_comes_back(server):
    results = []

    def client(number):
        try:
            body = {
                "context": "hello",
                "temperature": 2,
                "n": 1,
                "max_tokens": 120,
                "stream": number % 2 == 0,
            }
            _, response = server.open("chatlm", body, timeout=30)
            results.append((response.status, len(response.read())))
        except OSError as error:
            results.append(type(error).__name__)
        except Exception as error:
            results.append(repr(error))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    for worker in server.workers():
        worker.kill()
    begin = time.monotonic()
    for thread in threads:
        thread.join(35)
    assert len(results) == len(threads) and "TimeoutError" not in results, results

    def answers():
        try:
            return server.post("chatlm", {"context": "hello", "max_tokens": 2}, timeout=5)[0] == 200
        except OSError:
            return False

    eventually(answers, 120)
    print(f"back after {time.monotonic() - begin:.1f} s: {results}")


def test_sigterm_lets_a_stream_finish_and_leaves_nothing(models, tmp_path, short_folder):
    server = Server(
        tmp_path / "run",
        {"chatlm": models["chatlm"]},
        "--auth",
        environment={"TMPDIR": str(short_folder)},
    ).wait_until_ready()
    assert list(short_folder.glob("gptchat-*"))
    family = server.family()
    keys = json.loads((server.run / "key_file.json").read_text())
    assert (server.run / "key_file.json").stat().st_mode & 0o777 == 0o600
    for headers in ({}, {"authorization": "Bearer wrong"}):  # as the README says: no 401
        status, answer = server.post("chatlm", {"context": "hi"}, headers=headers)
        assert (status, answer["type"]) == (400, "InvalidKeyException")
    key = {"authorization": f"Bearer {keys['inference']['key']}"}
    connection, response = server.open(
        "chatlm",
        {
            "context": "hi",
            "stream": True,
            "max_new_tokens": 120,
            "temperature": 2,
            "repetition_penalty": 5,
        },
        headers=key,
    )
    assert response.status == 200 and response.read1(20)
    rest = []
    reader = threading.Thread(target=lambda: rest.append(response.read()))
    reader.start()
    seconds = server.stop(signal.SIGTERM, 15)
    reader.join(5)
    assert rest and rest[0].endswith(b"data: [DONE]\n\n")
    assert server.process.returncode == 0 and not psutil.wait_procs(family, 0)[1]
    assert not (server.run / "key_file.json").exists()
    assert list(short_folder.glob("gptchat-*")) == []
    print(f"gone after {seconds:.1f} s")

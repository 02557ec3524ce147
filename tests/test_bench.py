"""The benchmarks: they take turns, warm up, compute ratios, and give the peer the same weights."""

import argparse
import json
import sys
import threading
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.error import HTTPError

import pytest
import torch
from serving import tiny_model

from gptchat.bench import __main__ as bench
from gptchat.bench import decode, draw, serving, training
from gptchat.bench.report import Report
from gptchat.console import UserError
from gptchat.inference.request import Request
from gptchat.inference.sampling import Sampling
from gptchat.model.gpt2 import GPT2, GPT2Config

SMALL = GPT2Config(vocab_size=311, n_positions=64, n_embd=64, n_layer=2, n_head=4)


def test_race_warms_up_takes_turns_and_divides_medians():
    calls: list[str] = []

    def contestant(name: str, seconds: list[float]):
        return lambda: (calls.append(name), [seconds.pop(0)])[1]

    report = Report()
    medians = report.race(
        "sleep",
        "tokens/s",
        {"peer": contestant("peer", [99, 4, 8, 6]), "ours": contestant("ours", [99, 1, 3, 2])},
        rounds=3,
        amount=12,
    )
    assert calls == ["peer", "ours"] * 4
    assert medians == {"peer": 6, "ours": 2}
    assert [
        (line["median"], line["low"], line["high"], line["ratio"]) for line in report.lines
    ] == [(2, 1.5, 3, 1), (6, 4, 12, 3)]


@torch.inference_mode()
def test_the_peer_has_our_weights():
    torch.manual_seed(0)
    model, ids = GPT2(SMALL).eval(), torch.randint(311, (2, 20))
    torch.testing.assert_close(
        decode.Transformers(model).model(ids).logits,
        model.logits(model.hidden(ids)),
        atol=1e-5,
        rtol=0,
    )


def test_decode_tells_rates_ratios_and_quality(monkeypatch, capsys):
    monkeypatch.setattr(
        decode, "benchmark_model", lambda directory: (GPT2(SMALL).eval(), None, "lm")
    )
    asked = "bench decode --batches 1 2 --rounds 1 --new 4 --prompt 5 --first 9 --json"
    monkeypatch.setattr(sys, "argv", asked.split())
    bench.main()
    result = json.loads(capsys.readouterr().out)
    assert {"threads", "allocator", "torch", "transformers", "read_gb_per_s"} <= result[
        "machine"
    ].keys()
    who = ["transformers", "float32", "bfloat16", "int8"]
    turns = [f"{dtype}, {how}" for dtype in who[1:] for how in ("computed anew", "cached")]
    assert [line["who"] for line in result["lines"]] == [*who, "reading float32"] * 2 + who + turns
    assert all(line["low"] <= line["median"] <= line["high"] for line in result["lines"])
    assert [line["notes"].get("equal_greedy_rows") for line in result["lines"][1:12:5]] == [
        "1 of 1",
        "2 of 2",
        None,
    ]
    assert result["lines"][11]["notes"]["top1_agreement"] == "100.00%"
    assert result["lines"][-1]["notes"]["of_computed_anew"].endswith("%")


def test_draw_tells_its_share_of_the_step_it_is_part_of(monkeypatch, capsys):
    monkeypatch.setattr(draw, "benchmark_model", lambda directory: (GPT2(SMALL).eval(), None, "lm"))
    monkeypatch.setattr(sys, "argv", "bench draw --rows 2 --rounds 1 --new 4 --json".split())
    bench.main()
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert [line["what"] for line in lines] == [name for name in draw.SETTINGS for _ in "ab"] * 2
    for step, drawn in zip(lines[::2], lines[1::2], strict=True):
        assert step["who"].endswith(", step") and drawn["who"].endswith(", draw in it")
        assert 0 < drawn["median"] < step["median"]
        assert drawn["notes"]["of_the_step"] == f"{drawn['median'] / step['median']:.1%}"


@pytest.mark.parametrize("who", ["gptchat eager", "transformers"])
def test_a_training_step_trains(who, monkeypatch):
    monkeypatch.setattr(training, "train_config", lambda args: SMALL)
    trained, make = [], training.make_optimizers
    monkeypatch.setattr(
        training, "make_optimizers", lambda *of: (trained.append(of[0]), make(*of))[1]
    )
    step = training.training_step(who, argparse.Namespace(rows=2, row=16, precision="fp32"))
    before = [p.clone() for p in trained[0].parameters() if p.dim() > 1]
    step()
    after = [p for p in trained[0].parameters() if p.dim() > 1]
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("bench") / "model", "lm")


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ("decode --batches 1 0", "argument --batches: found '0'; wanted an integer of at least 1"),
        ("decode --rounds 0", "argument --rounds: found '0'; wanted an integer of at least 1"),
        ("decode --threads -1", "argument --threads: found '-1'; wanted an integer of at least 1"),
        ("train --row x", "argument --row: found 'x'; wanted an integer of at least 1"),
        ("decode --model MODEL --prompt 100", "164 tokens (--prompt and --new) do not fit into"),
        ("decode --model MODEL --first 9 --text nowhere", "nowhere: cannot be read: No such file"),
        ("decode --first 9 --text README.md", "--text: found no --model"),
        ("train --row 2000", "2000 tokens (--row) do not fit into"),
        ("serve --model MODEL --url http://127.0.0.1:9/x", "127.0.0.1:9/x: cannot be asked: "),
        ("serve --model MODEL --new 1000", "1032 tokens (--prompt and --new) do not fit into"),
        ("tokenizer --config nowhere.toml", "nowhere.toml: cannot be read"),
    ],
)
def test_wrong_use_is_one_line(arguments, reason, model_directory, monkeypatch):
    words = arguments.replace("MODEL", str(model_directory)).split()
    if words[0] == "serve":
        words += ["--clients", "1", "--rounds", "1"]
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(decode, "default_device", lambda: "cpu")
    with pytest.raises(UserError) as error:
        bench.main(words)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_text_into_shards_is_timed_with_the_command_itself(model_directory, tmp_path, capsys):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text("Some text of my own.\n\nAnd more of it.\n")
    (tmp_path / "lm.toml").write_text(
        f"""
        [tokenizer]
        dir = "{model_directory}"
        [data]
        train = ["{tmp_path}/train.txt"]
        valid = ["{tmp_path}/valid.txt"]
        [model]
        n_layer = 1
        n_head = 1
        n_embd = 8
        n_ctx = 16
        [train]
        num_steps = 1
        """
    )
    bench.main(["tokenizer", "--config", f"{tmp_path}/lm.toml", "--rounds", "1", "--json"])
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert [line["who"] for line in lines] == ["tokenizers", "gptchat.shards"]
    assert all(line["median"] > 0 for line in lines)


def test_a_server_that_refuses_is_one_line_with_its_reason(monkeypatch):
    def refuse(request, timeout):
        raise HTTPError(request.full_url, 400, "Bad", Message(), BytesIO(b'{"error": "no room"}'))

    monkeypatch.setattr(serving.urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match=r"http://x: status 400: .*no room"):
        serving.ask("http://x", Request([1]), stream=False)


class Streaming(BaseHTTPRequestHandler):
    """Answers with the first token, later with the second, the number of tokens and the end."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[dict[str, Any]]] = []
    may_go_on = threading.Event()

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.send('data: {"choices": [{"text": "a"}]}')
        assert self.may_go_on.wait(60)
        last = 'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}'
        self.send(f'data: {{"choices": [{{"text": "b"}}]}}\n\n{last}\n\ndata: [DONE]')
        self.wfile.write(b"0\r\n\r\n")

    def send(self, events: str) -> None:
        body = f"{events}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(body), body))

    def log_message(self, *_: Any) -> None:
        pass


def test_a_streamed_answer_is_timed_by_its_chunks_and_counted_by_the_server(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Streaming)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stamps: list[float] = []

    def read_clock() -> float:
        if stamps:  # the first chunk has been read
            Streaming.may_go_on.set()
        stamps.append(len(stamps))
        return stamps[-1]

    monkeypatch.setattr(serving, "time", SimpleNamespace(perf_counter=read_clock))
    request = Request([3, 4], sampling=Sampling(max_new_tokens=2, seed=1, logit_bias={5: -100}))
    try:
        seconds, tokens = serving.ask(f"http://127.0.0.1:{server.server_port}", request, True)
    finally:
        server.shutdown()
        server.server_close()
    assert (seconds, tokens) == ([1, 1], 2)
    (asked,) = Streaming.asked
    assert (asked["prompt"], asked["max_tokens"], asked["seed"]) == ([3, 4], 2, 1)
    assert asked["logit_bias"] == {"5": -100} and asked["stream"]


def test_a_model_that_would_end_at_once_answers_the_serving_benchmark_at_full_length(
    tmp_path, monkeypatch
):
    model, tokenizer, task = decode.benchmark_model(str(tiny_model(tmp_path, "lm")))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.ln_f.bias.fill_(1)
        model.wte.weight[tokenizer.eos_id] = 1  # its logit is 32, that of the others 0
    monkeypatch.setattr(serving, "benchmark_model", lambda _: (model, tokenizer, task))
    arguments = argparse.Namespace(model="", clients=[2], dtype="float32", prompt=4, new=20)
    benchmark = serving.ServingBenchmark(arguments)
    assert list(benchmark.engine_alone(2)) == [20, 20]


@pytest.mark.slow
def test_a_contestant_that_dies_ends_the_benchmark_instead_of_hanging(monkeypatch):
    monkeypatch.setattr(training, "CONTESTANTS", ("gptchat eager",))
    arguments = argparse.Namespace(config=None, rows=1, row=8, precision="fp32", rounds=1)
    arguments.threads = 0  # which torch refuses, in the contestant's process
    with pytest.raises(UserError, match="gptchat eager: its process has ended"):
        training.run(arguments, Report())

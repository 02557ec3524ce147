"""The benchmarks: they take turns, warm up, compute ratios, and give the peer the same weights."""

import argparse
import threading
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from serving import tiny_model

from gptchat.bench import Report, decode, serving, training
from gptchat.bench import __main__ as bench
from gptchat.console import UserError
from gptchat.inference.request import Request
from gptchat.inference.sampling import Sampling
from gptchat.model.gpt2 import GPT2Config

SMALL = GPT2Config(vocab_size=311, n_positions=64, n_embd=64, n_layer=2, n_head=4)


def test_race_warms_up_takes_turns_and_divides_medians():
    calls: list[str] = []

    def contestant(name: str, seconds: list[float]):
        return lambda: (calls.append(name), [seconds.pop(0)])[1]

    report = Report()
    contestants = {
        "peer": contestant("peer", [99, 4, 8, 6]),
        "ours": contestant("ours", [99, 1, 3, 2]),
    }
    medians = report.race("sleep", "tokens/s", contestants, rounds=3, amount=12)
    assert calls == ["peer", "ours"] * 4
    assert medians == {"peer": 6, "ours": 2}
    figures = [(line.median, line.low, line.high, line.ratio) for line in report.lines]
    assert figures == [(2, 1.5, 3, 1), (6, 4, 12, 3)]


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("bench") / "model", "lm")


@pytest.mark.parametrize("sampled", [False, True])
def test_decode_of_a_model_directory_gives_rates_ratios_and_quality(
    sampled, model_directory, monkeypatch, tmp_path
):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    (tmp_path / "text.txt").write_text("some text " * 200)
    words = f"decode --model {model_directory} --text {tmp_path}/text.txt --batches 2 --rounds 1"
    words += " --new 4 --prompt 5 --first 50 --dtypes float32 int8" + " --sampled" * sampled
    reports: list[Report] = []
    monkeypatch.setattr(Report, "show", lambda report: reports.append(report))
    bench.main(words.split())
    lines = reports[0].lines
    dtypes = ["float32", "int8"]
    turns = [f"{dtype}, {how}" for dtype in dtypes for how in ("computed anew", "cached")]
    assert [line.who for line in lines] == ["transformers", *dtypes] * 2 + turns
    assert all(line.low <= line.median <= line.high for line in lines)
    assert lines[1].notes == ({} if sampled else {"equal_greedy_rows": "2 of 2"})
    exact, rounded = (float(line.notes["perplexity"]) for line in lines[4:6])
    assert exact > 1 and rounded == pytest.approx(exact, rel=0.02)


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


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ("decode --batches 1 0", "argument --batches: found '0'; wanted an integer of at least 1"),
        ("decode --model MODEL --prompt 100", "164 tokens (--prompt and --new) do not fit into"),
        ("decode --model MODEL --first 9", "--first: found 9 tokens; wanted more than 40"),
        (
            "decode --model MODEL --new 9 --first 50 --text x",
            "x: cannot be read: [Errno 2]",
        ),
        ("decode --first 9 --text README.md", "found no --model"),
        ("train --row 2000", "2000 tokens (--row) do not fit into"),
        ("serve --model MODEL --url http://127.0.0.1:9/x", "127.0.0.1:9/x: cannot be asked: "),
    ],
)
def test_wrong_use_is_one_line(arguments, reason, model_directory, monkeypatch):
    words = arguments.replace("MODEL", str(model_directory)).split()
    if words[0] == "serve":
        words += ["--clients", "1", "--rounds", "1"]
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    with pytest.raises(UserError, match="^[^\n]+$") as error:
        bench.main(words)
    assert reason in str(error.value)


def test_a_server_that_refuses_is_one_line_with_its_reason(monkeypatch):
    def refuse(request, timeout):
        raise HTTPError(request.full_url, 400, "Bad", Message(), BytesIO(b'{"error": "no room"}'))

    monkeypatch.setattr(serving.DIRECT, "open", refuse)
    with pytest.raises(UserError, match=r"http://x: status 400: .*no room"):
        serving.ask("http://x", Request([1]))


class Streaming(BaseHTTPRequestHandler):
    """Answers with the first token, later with the second, the number of tokens and the end."""

    protocol_version = "HTTP/1.1"
    may_go_on = threading.Event()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
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
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # it is not asked
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
        seconds, tokens = serving.ask(f"http://127.0.0.1:{server.server_port}", request)
    finally:
        server.shutdown()
        server.server_close()
    assert (seconds, tokens) == ([1, 1], 2)


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

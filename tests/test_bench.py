"""The benchmarks: they take turns, warm up, compute ratios, and give the peer the same weights."""

import argparse
import json
import sys

import pytest
import torch

from gptchat.bench import __main__ as bench
from gptchat.bench import decode, training
from gptchat.bench.report import Report
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
        decode.Transformers(model).model(ids).logits, model.logits(model(ids)), atol=1e-5, rtol=0
    )


def test_decode_tells_rates_ratios_and_quality(monkeypatch, capsys):
    monkeypatch.setattr(decode, "start_model", lambda directory: (GPT2(SMALL).eval(), None, "lm"))
    asked = "bench decode --batches 1 2 --rounds 1 --new 4 --prompt 5 --first 9 --json"
    monkeypatch.setattr(sys, "argv", asked.split())
    bench.main()
    result = json.loads(capsys.readouterr().out)
    assert {"threads", "allocator", "torch", "transformers", "read_gb_per_s"} <= result[
        "machine"
    ].keys()
    who = ["transformers", "float32", "bfloat16", "int8"]
    assert [line["who"] for line in result["lines"]] == [*who, "reading float32"] * 2 + who
    assert all(line["low"] <= line["median"] <= line["high"] for line in result["lines"])
    assert [line["notes"].get("equal_greedy_rows") for line in result["lines"][1::5]] == [
        "1 of 1",
        "2 of 2",
        None,
    ]
    assert result["lines"][-3]["notes"]["top1_agreement"] == "100.00%"


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

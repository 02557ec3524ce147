"""gptchat beside what you would use instead: in one run, taking turns, on the same weights or text."""

import argparse
from collections.abc import Sequence

import torch

from gptchat.bench.decode import bench_decode
from gptchat.bench.report import Report
from gptchat.bench.serving import bench_serving
from gptchat.bench.tokenizer import bench_tokenizer
from gptchat.bench.training import bench_training
from gptchat.inference.linear import DTYPES


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="gptchat bench", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("what", choices=("decode", "train", "tokenizer", "serve"))
    parser.add_argument("--model", metavar="DIR", help="default: 124M, random weights")
    parser.add_argument(
        "--config", metavar="FILE", help="train: sizes; tokenizer: texts (default configs/lm.toml)"
    )
    parser.add_argument(
        "--text", metavar="FILE", help="decode: what perplexity is measured on, with --model"
    )
    parser.add_argument(
        "--url", default="http://127.0.0.1:8080/predictions/chatlm/1.0/v1/completions"
    )
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    for name, default in (("batches", [1, 8, 32]), ("clients", [1, 8, 32, 64])):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=default)
    for name, number in (
        ("rounds", 3),
        ("prompt", 32),
        ("new", 64),
        ("first", 512),
        ("rows", 4),
        ("row", 256),
        ("threads", torch.get_num_threads()),
    ):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--json", action="store_true")
    args, report = parser.parse_args(argv), Report()
    torch.set_num_threads(args.threads)
    {
        "decode": bench_decode,
        "train": bench_training,
        "tokenizer": bench_tokenizer,
        "serve": bench_serving,
    }[args.what](args, report)
    report.show(args.json)

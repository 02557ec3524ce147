"""`gptchat bench tokenizer`: encoding text into shards, beside the package `tokenizers` alone.

Ours is the whole command `gptchat shards`, its start and its files included. `tokenizers` only
encodes text that is already in memory. Both encode a config's text for training and validation.
"""

import argparse
import subprocess
import sys
import tempfile
import time

from gptchat.bench.report import Report, timed
from gptchat.config import load_config
from gptchat.console import UserError
from gptchat.data.tokenizer import tokenizer_for
from gptchat.files import expand


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        default="configs/lm.toml",
        help="names tokenizer and text (%(default)s)",
    )


def run(args: argparse.Namespace, report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"data.shards={folder}", "data.test=[]"]
        command = [sys.executable, "-m", "gptchat", "shards", "--config", args.config, *overrides]
        config = load_config(args.config, overrides)
        paths = expand(config.data.train, "data.train") + expand(config.data.valid, "data.valid")
        text = "".join(path.read_text(encoding="utf-8") for path in paths)
        documents = text.split("\n\n")
        backend = tokenizer_for(config).backend

        def encode_in_memory() -> list[float]:
            return timed(lambda: backend.encode_batch_fast(documents))

        def write_shards() -> list[float]:
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True)
            seconds = time.perf_counter() - start
            if done.returncode:
                reason = done.stderr.strip() or "gptchat shards: no reason given"
                raise UserError(reason.splitlines()[-1].removeprefix("error: "))
            return [seconds]

        megabytes = len(text.encode()) / 1e6
        contestants = {"tokenizers": encode_in_memory, "gptchat.shards": write_shards}
        report.race("encode", "MB/s", contestants, args.rounds, megabytes)

"""Encoding into shards beside the library tokenizers alone."""

import argparse
import subprocess
import sys
import tempfile

from gptchat.bench.report import Report, timed
from gptchat.config import load_config
from gptchat.data.tokenizer import tokenizer_for
from gptchat.files import expand


def bench_tokenizer(args: argparse.Namespace, report: Report) -> None:
    """The training text of a config into shards, by the command, its start and files written and all; `tokenizers` only
    encodes what is in memory."""
    with tempfile.TemporaryDirectory() as folder:
        path, changes = (
            args.config or "configs/lm.toml",
            [f"data.shards={folder}", "data.valid=[]", "data.test=[]"],
        )
        config, command = (
            load_config(path, changes),
            [sys.executable, "-m", "gptchat", "shards", "--config", path, *changes],
        )
        text = "".join(
            path.read_text(encoding="utf-8") for path in expand(config.data.train, "data.train")
        )
        blocks, backend = text.split("\n\n"), tokenizer_for(config).backend
        report.race(
            "encode",
            "MB/s",
            {
                "tokenizers": lambda: timed(lambda: backend.encode_batch_fast(blocks)),
                "gptchat.shards": lambda: timed(
                    lambda: subprocess.run(command, check=True, capture_output=True)
                ),
            },
            args.rounds,
            len(text.encode()) / 1e6,
        )

"""Shared by the tests: commands, processes, and the real corpora cut small.

The fixture `small` holds the beginnings of the corpora, encoded with a small vocabulary, and
configs that train tiny models on them.
"""

import contextlib
import io
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptchat.__main__ import main
from gptchat.data import corpora
from gptchat.inference.engine import Output
from gptchat.runtime import STOP_SIGNALS

# nohup ignores SIGHUP, and a shell SIGINT for what it starts in the background; the processes that
# tests start and send them to would ignore them too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# One thread here and in the processes that tests start: more cost more than they bring to models
# of this size, and results are then the same in all of them.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

SMALL_FILES = {  # name: the file of the default corpora that it begins as, and its bytes
    "lm/train.txt": ("lm/speeches-early.txt", 60_000),
    "lm/valid.txt": ("lm/valid.txt", 8_000),
    "lm/test.txt": ("lm/test.txt", 8_000),
    "chatlm/train.tsv": ("chatlm/train.tsv", 60_000),
    "chatlm/valid.tsv": ("chatlm/valid.tsv", 6_000),
    "chatlm/test.tsv": ("chatlm/test.tsv", 6_000),
}
CONFIG = """
task = "{task}"
run = "{folder}/out/{task}"
[tokenizer]
dir = "{folder}/tokenizer"
vocab_size = 400
files = ["{folder}/data/lm/train.txt"]
[data]
train = ["{folder}/data/{task}/train.{ending}"]
valid = ["{folder}/data/{task}/valid.{ending}"]
test = ["{folder}/data/{task}/test.{ending}"]
shards = "{folder}/shards/{task}"
[model]
n_layer = 2
n_head = 2
n_embd = 32
n_ctx = 64
dropout = 0.1
[train]
num_steps = 40
batch_size = 4
learning_rate = 3e-3
eval_interval = 20
log_interval = 5
precision = "fp32"
"""


def command(name: str, *arguments: object) -> list[str]:
    """The words that start `gptchat NAME` as a process."""
    return [sys.executable, "-m", "gptchat", name, *map(str, arguments)]


def run(*arguments: object, status: int = 0) -> str:
    """Run `gptchat ARGUMENTS` in this process, which has imported torch already.

    Returns stdout and stderr. The exit status must be `status`.
    """
    output, ended = io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with (
            mock.patch.object(sys, "argv", ["gptchat", *map(str, arguments)]),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            main()
    except SystemExit as exit:
        ended = exit.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended == status, output.getvalue()
    return output.getvalue()


@pytest.fixture(autouse=True)
def the_environment_is_left_as_it_was() -> Iterator[None]:
    """Libraries change it too: torch's compiler writes where its cache is."""
    with mock.patch.dict(os.environ):
        yield


STARTED: list[subprocess.Popen] = []


def start_process(arguments: list[str], **options: Any) -> subprocess.Popen:
    """Start a process that is killed at the end of the test, if it still runs then."""
    process = subprocess.Popen(arguments, text=True, **options)
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def started_processes_end_with_the_test() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.wait(60)


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 60
) -> None:
    """Return when `condition()` is true. Fails after `seconds`, or when `process` ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "the process has ended"
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder with so short a name that TorchServe's socket finds room below it: 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, tokenizer, shards, `lm.toml` and `chatlm.toml`."""
    folder = tmp_path_factory.mktemp("small")
    first_conversations = itertools.islice(corpora.conversations(), 300)
    with mock.patch.object(corpora, "conversations", lambda: first_conversations):
        run("corpora", "--out", folder / "whole")
    for name, (whole_name, size) in SMALL_FILES.items():
        text = (folder / "whole" / whole_name).read_bytes()[:size].rpartition(b"\n")[0] + b"\n"
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / name).write_bytes(text)
    for task, ending in (("lm", "txt"), ("chatlm", "tsv")):
        (folder / f"{task}.toml").write_text(CONFIG.format(task=task, ending=ending, folder=folder))
    run("tokenizer", "--config", folder / "lm.toml")
    for task in ("lm", "chatlm"):
        run("shards", "--config", folder / f"{task}.toml")
    return folder


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of a figure that a run gave to TensorBoard so far, such as "train/loss"."""
    if not (run / "tensorboard").exists():
        return []
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in events.Scalars(tag)]


def count_equal_greedy(alone: list[Output], company: list[Output], rounding: float) -> int:
    """How many greedy tokens of a row alone are the same in company, from the first on.

    Where they part, the two best log-probabilities must differ by less than `rounding`; until then
    a token's two log-probabilities must.
    """
    for count, (one, other) in enumerate(zip(alone, company, strict=True)):
        if one.token != other.token:
            assert one.scored.top[0][1] - one.scored.top[1][1] < rounding
            return count
        assert abs(one.scored.logprob - other.scored.logprob) < rounding
    return len(alone)

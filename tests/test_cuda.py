"""What a GPU must do as the CPU does it. One command runs it on a machine with a GPU:

    python -m pytest -m cuda

Elsewhere all tests are skipped. GPTCHAT_CUDA_TESTS_ON=cpu runs their bodies on the CPU, which tells
only that the tests themselves work.
"""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import command, count_equal_greedy, scalars
from torch import Tensor

from gptchat.config import TrainConfig, load_config
from gptchat.console import UserError
from gptchat.inference.engine import Engine, Request, generate
from gptchat.inference.sampling import Sampling
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.train import train, train_step
from gptchat.training.distributed import World, wrap_model
from gptchat.training.metrics import autocast
from gptchat.training.start import Run, start
from tests.hf_models import close, random_gpt2, write

ON_CPU = os.environ.get("GPTCHAT_CUDA_TESTS_ON") == "cpu"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="no GPU here"),
]
V, N_POSITIONS = 300, 256
STEPS = ["train.num_steps=6", "train.eval_interval=3", "train.log_interval=1"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if ON_CPU else "cuda")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Kernels that add in the same order each time; a warning tells of one that has no such form.

    On a GPU SDPA's backward pass otherwise adds in any order.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_run(small: Path, task: str, folder: Path, device: torch.device, *overrides: str) -> Run:
    settings = [f"run={folder}", f"train.device={device.type}", *STEPS, *overrides]
    config = load_config(str(small / f"{task}.toml"), settings)
    return start(config, World(config.train.device))


def losses(folder: Path, kind: str = "train") -> list[float]:
    return [value for _, value in scalars(folder, f"{kind}/loss")]


# --- the model


def logits_of_both(
    folder: Path, device: torch.device, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Ours and transformers' in a precision, and transformers' in float64 on the CPU."""
    theirs = random_gpt2(1, torch.float32)
    ours, _, _ = pretrained.load_model(write(theirs, folder))
    ids = torch.randint(V, (3, 41), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = random_gpt2(1, torch.float32).double()(ids).logits
        ids = ids.to(device)
        with autocast(device, precision):
            our_logits = ours.to(device).eval().logits(ours.hidden(ids))
            their_logits = theirs.to(device)(ids).logits
    return our_logits.double().cpu(), their_logits.double().cpu(), exact


def test_float32_logits_are_those_of_transformers(tmp_path: Path, device: torch.device) -> None:
    torch.set_float32_matmul_precision("highest")  # no TF32
    ours, theirs, exact = logits_of_both(tmp_path, device, "fp32")
    assert close(ours, theirs, 1e-5) and close(ours, exact, 1e-5)


def test_bfloat16_logits_are_as_exact_as_those_of_transformers(
    tmp_path: Path, device: torch.device
) -> None:
    ours, theirs, exact = logits_of_both(tmp_path, device, "bf16")
    assert (ours - exact).abs().mean() <= 1.2 * (theirs - exact).abs().mean()


def model_on(device: torch.device, compiled: bool = False) -> tuple[GPT2, torch.nn.Module]:
    """A model, and the same as training calls it."""
    sizes = dict(vocab_size=V, n_positions=N_POSITIONS, n_embd=64, n_layer=2, n_head=2)
    torch.manual_seed(0)
    model = GPT2(GPT2Config(**sizes, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)).to(device)
    return model, wrap_model(model, TrainConfig(compile=compiled), World(device.type))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_packed_row_gives_the_loss_and_gradients_of_its_documents(
    device: torch.device, compiled: bool
) -> None:
    lengths = (90, 7, 103)
    ids = torch.randint(V, (1, sum(lengths)), generator=torch.Generator().manual_seed(1)).to(device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].to(device)
    single, _ = model_on(device)
    wanted = torch.zeros((), device=device)
    for document in ids.split(lengths, 1):
        loss = single(document, document[0], token_type_ids=document % 2)
        loss.backward()
        wanted += loss.detach()
    packed, called = model_on(device, compiled)
    loss = called(
        ids, token_type_ids=ids % 2, position_ids=positions, segments=segments, targets=ids[0]
    )
    loss.backward()
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-5, atol=0)
    pairs = zip(packed.parameters(), single.parameters(), strict=True)
    assert all(close(one.grad, other.grad, 1e-4) for one, other in pairs)


# --- training


@pytest.mark.parametrize("task", ["lm", "chatlm"])
def test_a_resumed_run_is_the_uninterrupted_one(
    small: Path, tmp_path: Path, device: torch.device, deterministic: None, task: str
) -> None:
    settings = ["train.optimizer=muon", "train.precision=bf16"]
    whole = make_run(small, task, tmp_path / "whole", device, *settings)
    train(whole)
    stopped = make_run(small, task, tmp_path / "parts", device, *settings)
    stopped.stop()
    train(stopped)
    assert stopped.lock and stopped.state.step == 1
    stopped.lock.close()
    resumed = make_run(small, task, tmp_path / "parts", device, *settings)
    train(resumed)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_float16_with_its_scaler_learns_as_float32_does(
    small: Path, tmp_path: Path, device: torch.device
) -> None:
    for precision in ("fp32", "fp16"):
        settings = ["train.num_steps=20", "model.dropout=0", f"train.precision={precision}"]
        trained = make_run(small, "chatlm", tmp_path / precision, device, *settings)
        train(trained)
    assert trained.state.scaler["scale"] > 1
    wanted, found = (losses(tmp_path / name, "valid")[-1] for name in ("fp32", "fp16"))
    assert found == pytest.approx(wanted, rel=0.02)


def test_one_process_of_torchrun_trains_as_one_without(
    small: Path, tmp_path: Path, device: torch.device
) -> None:
    """On a GPU this is DDP over NCCL."""
    train(make_run(small, "lm", tmp_path / "alone", device, "model.dropout=0"))
    arguments = command("train", "--config", small / "lm.toml", f"run={tmp_path / 'torchrun'}")
    settings = [*STEPS, "model.dropout=0", f"train.device={device.type}"]
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 1".split()
    done = subprocess.run(
        [sys.executable, *torchrun, *arguments[1:], *settings],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "torchrun") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


@pytest.mark.parametrize("task", ["lm", "chatlm"])
def test_a_training_step_does_not_wait_for_the_gpu(
    small: Path, tmp_path: Path, device: torch.device, task: str
) -> None:
    trained = make_run(small, task, tmp_path, device, "train.optimizer=muon")
    train_step(trained, [trained.train_batches.micro_batch(0)])  # makes the optimizers' state
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(trained, [trained.train_batches.micro_batch(1)])
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


# --- inference


def clear_model_and_prompts(
    device: torch.device, max_new_tokens: int
) -> tuple[GPT2, list[Request]]:
    """A model whose logits differ clearly, and greedy requests of many lengths."""
    model, _ = model_on(device)
    with torch.no_grad():
        model.wte.weight.mul_(20)
    draw = random.Random(0)
    sampling = Sampling(temperature=0, max_new_tokens=max_new_tokens, logprobs=2)
    prompts = [[draw.randrange(V) for _ in range(draw.randint(1, 40))] for _ in range(10)]
    return model, [Request(ids, sampling=sampling) for ids in prompts]


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-3), ("bfloat16", 0.2)])
def test_greedy_ids_in_company_are_those_alone_where_the_best_is_clear(
    device: torch.device, dtype: str, rounding: float
) -> None:
    model, requests = clear_model_and_prompts(device, max_new_tokens=12)
    together = generate(Engine(model, slots=4, dtype=dtype), requests)
    equal = 0
    for request, [company] in zip(requests, together, strict=True):
        [[alone]] = generate(Engine(model, slots=1, dtype=dtype), [request])
        equal += count_equal_greedy(alone, company, rounding)
    assert equal > 60


def test_int8_is_refused_in_one_line(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("a CPU has int8")
    model, _ = model_on(device)
    with pytest.raises(UserError, match="dtype is 'int8', which needs an x86 CPU"):
        Engine(model, dtype="int8")

"""A run that went wrong ends in one line: it is not trained on, and not saved over a good one."""

import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run
from safetensors import safe_open
from safetensors.torch import save_file
from test_train import config_of, finish, start

from gptchat.console import RunFailed, UserError
from gptchat.train import Run
from gptchat.training import checkpoint
from gptchat.training.distributed import World
from gptchat.training.monitor import Monitor
from gptchat.training.saved_config import FREE_KEYS

SHORT = ("train.num_steps=20", "train.eval_interval=10", "train.log_interval=5")


def log_lines(folder: Path) -> list[dict]:
    """The log's lines; fails for the NaN and Infinity that Python writes but JSON does not know."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def saved_files(folder: Path) -> list[bytes]:
    return [
        (folder / name).read_bytes()
        for name in ("checkpoint.safetensors", "model/model.safetensors")
    ]


# --- numbers that are not finite


@pytest.mark.slow
def test_a_rate_that_is_too_high_ends_the_run_in_one_line_and_a_lower_one_goes_on(
    small: Path, tmp_path: Path
) -> None:
    finish(start(small, "lm", tmp_path, *SHORT))
    before = saved_files(tmp_path)
    longer = ("train.num_steps=40", *SHORT[1:])
    arguments = ("--config", small / "lm.toml", f"run={tmp_path}", *longer)
    output = run("train", *arguments, "train.learning_rate=1e30", status=1)
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in output
    assert "the checkpoint of step 20" in line
    assert "train.learning_rate" in line
    assert saved_files(tmp_path) == before
    log_lines(tmp_path)
    output = run("train", *arguments, "train.learning_rate=1e-3")
    assert "train.learning_rate was 0.003, is 0.001" in output
    assert log_lines(tmp_path)[-1]["step"] == 40


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("place", ["weight", "gradient", "stop"])
def test_a_value_that_is_not_finite_ends_the_run_before_anything_is_saved(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, precision: str
) -> None:
    """`stop`: a signal asks for a checkpoint right after the weights went wrong."""
    if (place, precision) == ("gradient", "fp16"):
        pytest.skip("fp16 skips such a step")
    config = config_of(small, "lm", tmp_path, *SHORT, f"train.precision={precision}")
    trained = Run(config, World("cpu"))
    plain_step = trained.step

    def step(micro_batches: list) -> torch.Tensor:
        grad_norm = plain_step(micro_batches)
        if trained.state.step == 12:
            if place == "gradient":
                return torch.tensor(math.inf)
            with torch.no_grad():
                trained.model.wte.weight[7, 3] = math.nan
            trained.stopped = place == "stop"
        if trained.state.step == 10:
            kept.extend(saved_files(tmp_path))
        return grad_norm

    kept: list[bytes] = []
    monkeypatch.setattr(trained, "step", step)
    with pytest.raises(RunFailed, match="^[^\n]+the checkpoint of step 10[^\n]+$") as error:
        trained.train()
    assert "nan" in str(error.value) or "inf" in str(error.value)
    assert re.search(r"\(before, at step 1[0-3]: [a-z -]+ \d", str(error.value))
    assert saved_files(tmp_path) == kept
    assert [line["step"] for line in log_lines(tmp_path)][-1] == 10


@pytest.mark.parametrize("loss_sum", [math.nan, math.inf])
def test_a_held_out_loss_that_is_not_finite_ends_the_run_before_it_is_logged(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_sum: float
) -> None:
    trained = Run(config_of(small, "lm", tmp_path, *SHORT), World("cpu"))
    plain_evaluate = trained.evaluate

    def evaluate(monitor: Monitor) -> None:
        if trained.state.step == 20:
            kept.extend(saved_files(tmp_path))
            monkeypatch.setattr("gptchat.train.sum_losses", lambda *arguments: (loss_sum, 7))
        plain_evaluate(monitor)

    kept: list[bytes] = []
    monkeypatch.setattr(trained, "evaluate", evaluate)
    with pytest.raises(RunFailed, match="at step 20: held-out loss (nan|inf)"):
        trained.train()
    assert saved_files(tmp_path) == kept
    last = log_lines(tmp_path)[-1]
    assert (last["step"], last["kind"]) == (20, "train")


def test_the_log_of_a_step_that_fp16_skipped_is_json(small: Path, tmp_path: Path) -> None:
    settings = ("train.num_steps=4", "train.precision=fp16", "train.log_interval=1")
    trained = Run(config_of(small, "lm", tmp_path, *settings), World("cpu"))
    trained.scaler.load_state_dict(trained.scaler.state_dict() | {"scale": 2.0**120})
    trained.train()
    assert [line["grad_norm"] for line in log_lines(tmp_path)[:4]] == [None] * 4


# --- fp16's skipped steps


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_an_overflow_in_the_gradients_of_one_optimizer_skips_the_step_of_all(
    small: Path, tmp_path: Path, max_grad_norm: float
) -> None:
    settings = (
        "train.precision=fp16",
        "train.optimizer=muon",
        f"train.max_grad_norm={max_grad_norm}",
    )
    trained = Run(config_of(small, "lm", tmp_path, *settings), World("cpu"))
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    for broken in (trained.model.wpe.weight, trained.model.h[0].mlp.c_fc.weight):
        trained.loss(trained.train_batches.micro_batch(0))
        trained.scaler.scale(torch.ones(()))
        for parameter in trained.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        broken.grad[0, 0] = math.inf
        scale = trained.scaler.get_scale()
        trained._update_weights()
        assert trained.scaler.get_scale() == scale / 2
        for name, value in trained.model.state_dict().items():
            assert torch.equal(value, before[name]), name
    for parameter in trained.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    trained._update_weights()
    for name, parameter in trained.model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert parameter.isfinite().all(), name


# --- the order of sums


def weights_after_six_steps(small: Path, folder: Path, optimizer: str) -> list[torch.Tensor]:
    """The weights of two runs that sum the same three gradients in different orders, as (a + b) + c
    in one process and (a + c) + b in two."""
    settings = ("model.dropout=0", "train.gradient_accumulation_steps=3")
    weights = []
    for order in ((0, 1, 2), (0, 2, 1)):
        run = folder / f"{order}"
        config = config_of(small, "lm", run, *settings, f"train.optimizer={optimizer}")
        trained = Run(config, World("cpu"))
        for step in range(6):
            trained.state.step = step
            trained.step([trained.train_batches.micro_batch(3 * step + i) for i in order])
        weights.append(
            torch.cat([value.detach().flatten() for value in trained.model.parameters()])
        )
    return weights


@pytest.mark.parametrize(
    ("optimizer", "in_float32", "least", "most"),
    [("adamw", False, 0, 1e-4), ("muon", True, 0, 1e-4), ("muon", False, 1e-4, 2e-2)],
)
def test_it_is_in_bfloat16_that_muon_makes_the_order_of_sums_matter(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    in_float32: bool,
    least: float,
    most: float,
) -> None:
    """As configs/README.md says of runs with another number of processes."""
    multiplies_bfloat16 = "gptchat.training.optim.multiplies_bfloat16"
    monkeypatch.setattr(multiplies_bfloat16, lambda device: not in_float32)
    one, two = weights_after_six_steps(small, tmp_path, optimizer)
    assert least <= (one - two).abs().max() <= most


# --- going on with another config


def rewrite_config(path: Path, changes: dict[str, object | None]) -> None:
    """Change the config that a checkpoint holds as another version would have written it.

    `changes` maps "section.key" to a value; None removes the key.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    config = json.loads(metadata["config"])
    for full_name, value in changes.items():
        section, key = full_name.split(".")
        config[section].pop(key, None)
        if value is not None:
            config[section][key] = value
    metadata["config"] = json.dumps(config)
    metadata["digest"] = checkpoint.digest(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.slow
def test_a_key_that_the_checkpoint_lacks_counts_as_saved_with_its_default(
    small: Path, tmp_path: Path
) -> None:
    finish(start(small, "lm", tmp_path, *SHORT))
    rewrite_config(tmp_path / "checkpoint.safetensors", {"train.beta2": None})
    refused = finish(start(small, "lm", tmp_path, *SHORT, "train.beta2=0.5"), 2)
    assert "train.beta2 was 0.95, is 0.5" in refused
    assert "finished at step 20" in finish(start(small, "lm", tmp_path, *SHORT))


@pytest.mark.slow
def test_a_saved_key_that_no_longer_exists_is_named(small: Path, tmp_path: Path) -> None:
    finish(start(small, "lm", tmp_path, *SHORT))
    rewrite_config(tmp_path / "checkpoint.safetensors", {"train.momentum": 0.3})
    output = finish(start(small, "lm", tmp_path, *SHORT))
    assert "train.momentum was 0.3, a key that no longer exists" in output


@pytest.mark.slow
def test_a_refused_change_lists_the_keys_that_may_change(small: Path, tmp_path: Path) -> None:
    finish(start(small, "lm", tmp_path, *SHORT))
    refused = finish(start(small, "lm", tmp_path, *SHORT, "train.beta1=0.5"), 2)
    assert refused.count("\n") == 1
    assert all(key in refused for key in FREE_KEYS)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("fp32", "fp16"), ("fp16", "fp32")])
def test_a_run_goes_on_in_another_precision(
    small: Path, tmp_path: Path, before: str, after: str
) -> None:
    finish(start(small, "lm", tmp_path, *SHORT, f"train.precision={before}"))
    longer = ("train.num_steps=40", *SHORT[1:])
    output = finish(start(small, "lm", tmp_path, *longer, f"train.precision={after}"))
    assert f"train.precision was '{before}', is '{after}'" in output
    losses = [line["loss"] for line in log_lines(tmp_path)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_fewer_steps_than_the_run_has_made_are_told_as_such(small: Path, tmp_path: Path) -> None:
    finish(start(small, "lm", tmp_path, *SHORT))
    refused = finish(start(small, "lm", tmp_path, "train.num_steps=12"), 2)
    assert "stands at step 20" in refused and "12 steps" in refused
    assert refused.count("\n") == 1


@pytest.mark.slow
def test_a_chat_run_goes_on_when_the_model_that_it_started_from_is_gone(
    small: Path, tmp_path: Path
) -> None:
    finish(start(small, "lm", tmp_path / "lm", *SHORT))
    chat = [f"init_from={tmp_path / 'lm/model'}", "train.log_interval=5", "train.eval_interval=10"]
    chat += [f"model.{size}=0" for size in ("n_layer", "n_head", "n_embd")]
    finish(start(small, "chatlm", tmp_path / "whole", *chat, "train.num_steps=20"))
    finish(start(small, "chatlm", tmp_path / "chat", *chat, "train.num_steps=10"))
    shutil.rmtree(tmp_path / "lm")
    finish(start(small, "chatlm", tmp_path / "chat", *chat, "train.num_steps=10"))
    finish(start(small, "chatlm", tmp_path / "chat", *chat, "train.num_steps=20"))
    assert log_lines(tmp_path / "chat")[-1]["step"] == 20
    refused = finish(start(small, "chatlm", tmp_path / "new", *chat, "train.num_steps=20"), 2)
    assert str(tmp_path / "lm/model") in refused


# --- damaged checkpoints


@pytest.mark.slow
def test_a_flipped_bit_anywhere_in_a_checkpoint_is_refused_in_one_line(
    small: Path, tmp_path: Path
) -> None:
    config = config_of(small, "lm", tmp_path, *SHORT)
    finish(start(small, "lm", tmp_path, *SHORT))
    path = tmp_path / "checkpoint.safetensors"
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    draw = random.Random(0)
    places = [draw.randrange(8, 8 + header) for _ in range(40)]
    places += [draw.randrange(8 + header, len(content)) for _ in range(40)]
    trained = Run(config, World("cpu"))
    parts = (trained.model, trained.optimizers, trained.resolved_config)
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(UserError, match="^[^\n]*checkpoint.safetensors[^\n]*$"):
            checkpoint.load_checkpoint(path, *parts)
    path.write_bytes(content)
    assert checkpoint.load_checkpoint(path, *parts)[0].step == 20


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["half", "header", "empty", "folder", "state", "shape", "surplus"])
def test_a_checkpoint_cut_by_hand_is_refused_in_one_line(
    small: Path, tmp_path: Path, cut: str
) -> None:
    config = config_of(small, "lm", tmp_path, *SHORT)
    finish(start(small, "lm", tmp_path, *SHORT))
    path = tmp_path / "checkpoint.safetensors"
    content = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if cut == "state":
        tensors = {name: value for name, value in tensors.items() if name.startswith("model.")}
    elif cut == "shape":
        tensors["model.wpe.weight"] = tensors["model.wpe.weight"][:5].contiguous()
    elif cut == "surplus":
        tensors["model.h.7.ln_1.weight"] = torch.zeros(32)
    path.unlink()
    if cut == "folder":
        path.mkdir()
    elif cut in ("half", "header", "empty"):
        path.write_bytes(content[: {"half": len(content) // 2, "header": 100, "empty": 0}[cut]])
    else:
        metadata["digest"] = checkpoint.digest(tensors, metadata)
        save_file(tensors, path, metadata)
    with pytest.raises(UserError, match="^[^\n]+remove it to start the run anew$"):
        Run(config, World("cpu"))

"""The loop: every target weighs the same, a resumed run is the same run, many processes are one."""

import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import command, run, start_process, wait_until
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from gptchat.config import Config, load_config
from gptchat.console import UserError
from gptchat.data.batches import Batch, Batches
from gptchat.data.shards import open_shards
from gptchat.data.tokenizer import tokenizer_for
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.train import Run
from gptchat.training import checkpoint
from gptchat.training.checkpoint import TrainState
from gptchat.training.distributed import World
from gptchat.training.monitor import step_flops
from gptchat.training.optim import (
    lr_scale,
    make_optimizers,
    optimizer_state,
    set_learning_rate,
)
from gptchat.training.saved_config import resolve_config

TASKS = ("lm", "chatlm")
CONFIG = resolve_config(Config(), {"init": []})  # of a checkpoint that no command made


def config_of(small: Path, task: str, folder: Path, *overrides: str) -> Config:
    return load_config(str(small / f"{task}.toml"), [f"run={folder}", *overrides])


def mixture(small: Path, task: str) -> list[str]:
    """Settings of a run on two sources with weights, all turns of dialogues being targets."""
    ending = "txt" if task == "lm" else "tsv"
    sources = ", ".join(f'"{small}/data/{task}/{split}.{ending}"' for split in ("train", "valid"))
    settings = [
        f"data.train=[{sources}]",
        "data.weights=[0.3, 0.7]",
        f"data.shards={small}/mixed-{task}",
    ]
    if task == "chatlm":
        settings += ["data.targets=turns"]
    run("shards", "--config", small / f"{task}.toml", *settings)
    return settings


def start(
    small: Path, task: str, folder: Path, *overrides: str, processes: int = 1
) -> subprocess.Popen:
    arguments = command("train", "--config", small / f"{task}.toml", f"run={folder}", *overrides)
    if processes > 1:
        arguments = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            *arguments[1:],
        ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return start_process(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


def small_model(vocab_size: int = 50, **changes: object) -> GPT2:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=256,
        n_embd=32,
        n_layer=2,
        n_head=2,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    model = GPT2(dataclasses.replace(config, **changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the gradients, which are cleared."""
    copies = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return copies


def assert_close(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], bound: float
) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= bound * max(1e-3, tensor.abs().max()), name


# --- the loss


@pytest.mark.parametrize(
    ("split", "targets"),
    [("valid", "response"), ("train", "responder"), ("train", "turns"), ("valid", "all")],
)
def test_packed_loss_and_gradients_are_the_sum_of_the_dialogues_one_by_one(
    small: Path, split: str, targets: str
) -> None:
    config = load_config(str(small / "chatlm.toml"))
    tokenizer = tokenizer_for(config)
    shards = open_shards(config, split, tokenizer)
    n_ctx = 1024
    model = small_model(tokenizer.vocab_size, n_positions=n_ctx)
    packed, single = (
        Batches([shards], tokenizer, n_ctx, size, packed=packed, targets=targets)
        for size, packed in ((3, True), (1, False))
    )
    excerpts = sorted({excerpt for row in range(3) for excerpt in packed.orders[0].row(row)})
    loss = model(**packed.micro_batch(0).inputs("cpu"))
    loss.backward()
    whole, total = gradients(model), 0.0
    for excerpt in excerpts:
        one = model(**single._dialogue_batch([(shards, [excerpt])]).inputs("cpu"))
        one.backward()
        total += float(one.detach())
    assert len(excerpts) > 4
    assert float(loss.detach()) == pytest.approx(total, rel=1e-12)
    assert_close(gradients(model), whole, 1e-9)


def test_a_micro_batch_without_targets_gives_zero(small: Path) -> None:
    model = small_model()
    nothing = torch.zeros(0, dtype=torch.int64)
    loss = model(torch.zeros(2, 8, dtype=torch.int64), target_positions=nothing, targets=nothing)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients(model).values())


@pytest.mark.parametrize("task", TASKS)
def test_accumulated_micro_batches_give_the_gradient_of_the_whole(
    small: Path, tmp_path: Path, task: str
) -> None:
    """Targets are spread unevenly over the micro-batches of chat; each must weigh the same."""
    outcomes = []
    for number, (rows, accumulation) in enumerate(((12, 1), (4, 3), (1, 12))):
        folder = tmp_path / str(number)
        trained = Run(
            config_of(
                small,
                task,
                folder,
                f"train.batch_size={rows}",
                f"train.gradient_accumulation_steps={accumulation}",
                "model.dropout=0",
            ),
            World("cpu"),
        )
        micro_batches = [trained.train_batches.micro_batch(i) for i in range(accumulation)]
        for optimizer in trained.optimizers:
            optimizer.zero_grad = lambda: None
        trained.model.double()
        trained.step(micro_batches)
        outcomes.append((gradients(trained.model), trained.take_mean_loss()))
    (whole, whole_loss), *others = outcomes
    for accumulated, loss in others:
        assert loss == pytest.approx(whole_loss, rel=1e-9)
        assert_close(accumulated, whole, 1e-9)


# --- resuming

KILLS = 10 if "GPTCHAT_LONG" in os.environ else 4


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], str, dict[str, torch.Tensor]]:
    return (
        load_file(folder / "checkpoint.safetensors"),
        (folder / "log.jsonl").read_text(),
        load_file(folder / "model" / "model.safetensors"),
    )


def assert_same_run(folder: Path, other: Path) -> None:
    (ours, log, best), (theirs, their_log, their_best) = outcome(folder), outcome(other)
    assert log == their_log
    for left, right in ((ours, theirs), (best, their_best)):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "mixed"), [("lm", True), ("chatlm", False), ("chatlm", True)])
def test_a_run_killed_again_and_again_equals_an_uninterrupted_one(
    small: Path, tmp_path: Path, task: str, mixed: bool
) -> None:
    settings = [f"train.num_steps={60 * KILLS}", "train.eval_interval=10"]
    if mixed:
        settings += mixture(small, task)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(small, task, whole, *settings))
    moments, kills = random.Random(task), 0
    while kills < KILLS:
        process = start(small, task, killed, *settings)
        grown = (killed / "log.jsonl").stat().st_size if (killed / "log.jsonl").exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if (killed / "log.jsonl").exists() and (killed / "log.jsonl").stat().st_size != grown:
                break
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, "the run ended before its last kill"
        kills += 1
    finish(start(small, task, killed, *settings))
    assert_same_run(killed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_or_a_burst_of_it_saves_and_the_same_command_goes_on(
    small: Path, tmp_path: Path, number: int
) -> None:
    settings = ["train.num_steps=300", "train.eval_interval=1000"]
    finish(start(small, "chatlm", tmp_path / "whole", *settings))
    process = start(small, "chatlm", tmp_path / "stopped", *settings)
    log = tmp_path / "stopped/log.jsonl"
    wait_until(lambda: log.exists() and log.stat().st_size, process)
    for _ in range(5):
        process.send_signal(number)
        time.sleep(0.01)
    assert "goes on from here" in finish(process, 130)
    finish(start(small, "chatlm", tmp_path / "stopped", *settings))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
def test_a_finished_run_says_so_and_another_config_is_refused_by_its_keys(
    small: Path, tmp_path: Path
) -> None:
    finish(start(small, "lm", tmp_path))
    before = outcome(tmp_path)
    assert "finished at step 40 of 40" in finish(start(small, "lm", tmp_path))
    refused = finish(start(small, "lm", tmp_path, "train.weight_decay=0.2", "model.n_embd=64"), 2)
    assert "model.n_embd was 32, is 64; train.weight_decay was 0.1, is 0.2" in refused
    assert refused.count("\n") == 1
    assert before[1] == (tmp_path / "log.jsonl").read_text()


@pytest.mark.slow
def test_a_log_that_was_cut_by_hand_is_not_filled_up(small: Path, tmp_path: Path) -> None:
    finish(start(small, "lm", tmp_path, "train.num_steps=10", "train.eval_interval=10"))
    (tmp_path / "log.jsonl").write_bytes(b"")
    finish(start(small, "lm", tmp_path, "train.num_steps=20", "train.eval_interval=10"))
    assert [json.loads(line)["step"] for line in open(tmp_path / "log.jsonl")][-1] == 20


@pytest.mark.slow
def test_a_chat_run_does_not_go_on_from_another_lm(small: Path, tmp_path: Path) -> None:
    finish(start(small, "lm", tmp_path / "lm", "train.num_steps=5"))
    chat = [
        f"init_from={tmp_path / 'lm/model'}",
        "model.n_layer=0",
        "model.n_head=0",
        "model.n_embd=0",
    ]
    finish(start(small, "chatlm", tmp_path / "chat", *chat, "train.num_steps=5"))
    finish(start(small, "lm", tmp_path / "lm", "train.num_steps=40"))
    assert "text.init was" in finish(
        start(small, "chatlm", tmp_path / "chat", *chat, "train.num_steps=5"), status=2
    )


@pytest.mark.slow
def test_a_second_run_on_the_same_folder_is_refused_while_one_is_running(
    small: Path, tmp_path: Path
) -> None:
    held = checkpoint.lock(tmp_path)
    assert "another run is training here" in finish(start(small, "lm", tmp_path), 2)
    held.close()
    finish(start(small, "lm", tmp_path, "train.num_steps=5"))


@pytest.mark.slow
def test_early_stopping_keeps_the_best_model(small: Path, tmp_path: Path) -> None:
    settings = [
        "train.num_steps=2000",
        "train.eval_interval=10",
        "train.patience=2",
        "train.learning_rate=0.03",
        "train.schedule=constant",
        "train.precision=bf16",
        "train.optimizer=muon",
    ]
    finish(start(small, "chatlm", tmp_path, *settings))
    held_out = [
        line["loss"]
        for line in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
        if line["kind"] == "valid"
    ]
    best = held_out.index(min(held_out))
    assert len(held_out) == best + 3 < 200
    assert "finished" in finish(start(small, "chatlm", tmp_path, *settings))


# --- the checkpoint


def trained_model(small: Path) -> tuple[GPT2, list[Optimizer]]:
    """A model after two steps of Muon and AdamW on made-up gradients."""
    config = load_config(str(small / "lm.toml"), ["train.optimizer=muon"]).train
    model = small_model().float()
    optimizers = make_optimizers(model, config)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
    return model, optimizers


def reordered(optimizer: Optimizer) -> Optimizer:
    """A new optimizer of the same kind, with its groups and the parameters in each reversed."""
    groups = [
        group | {"params": group["params"][::-1]} for group in reversed(optimizer.param_groups)
    ]
    return type(optimizer)(groups)


def rewrite_checkpoint(
    path: Path, metadata: dict[str, str | None], dropped: Sequence[str] = ()
) -> None:
    """Change a checkpoint's metadata (None removes an entry) and leave tensors out."""
    with safe_open(path, framework="pt") as file:
        changed = file.metadata() | metadata
        tensors = {name: file.get_tensor(name) for name in file.keys() if name not in dropped}
    kept = {key: value for key, value in changed.items() if value is not None}
    if "format" in kept:
        kept["digest"] = checkpoint.digest(tensors, kept)
    save_file(tensors, path, kept)


def test_optimizer_state_is_named_by_kind_and_parameter(small: Path) -> None:
    state = optimizer_state(*trained_model(small))
    assert "optimizer.adamw.h.0.ln_1.weight.exp_avg" in state
    assert "optimizer.muon.h.1.mlp.c_fc.weight.momentum_buffer" in state


def test_optimizer_state_finds_its_parameters_in_any_order(small: Path, tmp_path: Path) -> None:
    model, optimizers = trained_model(small)
    saved = {name: value.clone() for name, value in optimizer_state(model, optimizers).items()}
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save_checkpoint(path, model, optimizers, TrainState(step=2), CONFIG)
    others = [reordered(optimizer) for optimizer in reversed(optimizers)]
    assert not optimizer_state(model, others)
    assert checkpoint.load_checkpoint(path, model, others, CONFIG)[0].step == 2
    restored = optimizer_state(model, others)
    assert restored.keys() == saved.keys()
    assert all(torch.equal(restored[name], saved[name]) for name in saved)


@pytest.mark.parametrize("part", ["exp_avg", "all"])
def test_a_checkpoint_without_the_state_of_a_parameter_is_refused(
    small: Path, tmp_path: Path, part: str
) -> None:
    model, optimizers = trained_model(small)
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save_checkpoint(path, model, optimizers, TrainState(), CONFIG)
    parts = ["exp_avg", "exp_avg_sq", "step"] if part == "all" else [part]
    rewrite_checkpoint(path, {}, [f"optimizer.adamw.wpe.weight.{key}" for key in parts])
    with pytest.raises(UserError, match="^[^\n]+$") as error:
        checkpoint.load_checkpoint(path, model, optimizers, CONFIG)
    assert "no optimizer.adamw.wpe.weight.exp_avg" in str(error.value)
    assert "remove it to start the run anew" in str(error.value)


def test_a_checkpoint_saved_before_an_optimizer_made_a_step_loads(
    small: Path, tmp_path: Path
) -> None:
    """As fp16 writes one when it has skipped every step so far."""
    model, optimizers = trained_model(small)
    path = tmp_path / "checkpoint.safetensors"
    skipped = TrainState(step=2, scaler={"scale": 1.0})
    checkpoint.save_checkpoint(path, model, [], skipped, CONFIG)
    others = [reordered(optimizer) for optimizer in optimizers]
    assert checkpoint.load_checkpoint(path, model, others, CONFIG)[0].step == 2
    assert not optimizer_state(model, others)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "shown"), [(None, "unknown"), ("1", "1"), ("99", "99")])
def test_a_checkpoint_of_another_format_is_refused_in_one_line_that_says_what_to_do(
    small: Path, tmp_path: Path, number: str | None, shown: str
) -> None:
    settings = ["train.num_steps=2", "train.eval_interval=1"]
    finish(start(small, "lm", tmp_path, *settings))
    rewrite_checkpoint(tmp_path / "checkpoint.safetensors", {"format": number})
    refused = finish(start(small, "lm", tmp_path, *settings), 2)
    assert f"found checkpoint format {shown}; wanted {checkpoint.CHECKPOINT_FORMAT}" in refused
    assert "remove the file to start anew" in refused
    assert refused.count("\n") == 1


# --- switches


@pytest.mark.slow
def test_activation_checkpointing_and_compilation_change_no_result(
    small: Path, tmp_path: Path
) -> None:
    """Dropout on: the recomputed activations must be the same."""
    results = []
    for number, switch in enumerate(("seed=0", "activation_checkpointing=true", "compile=true")):
        dropout = "model.dropout=0" if "compile" in switch else "model.dropout=0.1"
        trained = Run(
            config_of(small, "chatlm", tmp_path / str(number), f"train.{switch}", dropout),
            World("cpu"),
        )
        for optimizer in trained.optimizers:
            optimizer.zero_grad = lambda: None
        trained.step([trained.train_batches.micro_batch(0)])
        results.append(gradients(trained.model))
    plain = Run(config_of(small, "chatlm", tmp_path / "plain", "model.dropout=0"), World("cpu"))
    for optimizer in plain.optimizers:
        optimizer.zero_grad = lambda: None
    plain.step([plain.train_batches.micro_batch(0)])
    assert_close(results[1], results[0], 1e-6)
    assert_close(results[2], gradients(plain.model), 1e-4)


@pytest.mark.slow
def test_without_a_compiler_one_line_says_so_and_training_is_eager(
    small: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"PATH": str(Path(sys.executable).parent), "CXX": "no-such-compiler"}
    done = subprocess.run(
        command(
            "train",
            "--config",
            small / "lm.toml",
            f"run={tmp_path}",
            "train.compile=true",
            "train.num_steps=2",
        ),
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training eagerly") == 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_as_fp32_does(small: Path, tmp_path: Path, precision: str) -> None:
    losses = {}
    for name in ("fp32", precision):
        finish(start(small, "lm", tmp_path / name, f"train.precision={name}", "model.dropout=0"))
        losses[name] = [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]
    assert losses["fp32"][-1] < losses["fp32"][0] - 0.5
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.02)


# --- many processes


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True], ids=["one source", "mixture"])
def test_two_processes_equal_one(small: Path, tmp_path: Path, mixed: bool) -> None:
    settings = [
        *(mixture(small, "chatlm") if mixed else []),
        "model.dropout=0",
        "train.gradient_accumulation_steps=3",
        "train.num_steps=20",
        "train.eval_interval=10",
    ]
    for processes in (1, 2):
        finish(start(small, "chatlm", tmp_path / str(processes), *settings, processes=processes))
    (one, log, _), (two, their_log, _) = outcome(tmp_path / "1"), outcome(tmp_path / "2")
    for ours, theirs in zip(log.splitlines(), their_log.splitlines(), strict=True):
        assert json.loads(ours)["loss"] == pytest.approx(json.loads(theirs)["loss"], rel=1e-4)
    weights = {name: value for name, value in one.items() if name.startswith("model.")}
    assert_close({name: two[name] for name in weights}, weights, 1e-2)


@pytest.mark.slow
def test_a_run_goes_on_with_two_processes_on_the_same_batches(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [
        "model.dropout=0",
        "train.gradient_accumulation_steps=2",
        "train.num_steps=40",
        "train.eval_interval=20",
    ]
    finish(start(small, "lm", tmp_path / "one", *settings))
    stopped = Run(config_of(small, "lm", tmp_path / "two", *settings), World("cpu"))
    plain_step = stopped.step

    def step(micro_batches: list[Batch]) -> torch.Tensor:
        if stopped.state.step == 12:
            stopped.stop()
        return plain_step(micro_batches)

    monkeypatch.setattr(stopped, "step", step)
    stopped.train()
    assert stopped.lock and stopped.state.step == 13
    stopped.lock.close()
    finish(start(small, "lm", tmp_path / "two", *settings, processes=2))
    one, two = (
        json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])
        for name in ("one", "two")
    )
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


# --- what cannot be written


def unwritable(kind: str, folder: Path) -> None:
    """Make writes of this process to the folder fail; root must become another user for it."""
    if kind == "full":
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
    else:
        folder.chmod(0o555)
        os.seteuid(65534)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_what_cannot_be_saved_is_one_error_and_leaves_the_old_files(
    small: Path, tmp_path: Path, kind: str
) -> None:
    config = config_of(small, "lm", tmp_path, "train.num_steps=10", "train.eval_interval=5")
    finish(start(small, "lm", tmp_path, "train.num_steps=10", "train.eval_interval=5"))
    before = outcome(tmp_path)
    for folder in (*tmp_path.parents, tmp_path):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    trained = Run(config, World("cpu"))
    limit, user = resource.getrlimit(resource.RLIMIT_FSIZE), os.geteuid()
    if kind == "read-only" and user != 0:
        pytest.skip("needs root, to write as another user")
    with trained.start_monitor() as monitor:
        unwritable(kind, tmp_path)
        try:
            with pytest.raises(UserError, match="cannot be written") as error:
                trained.save(monitor)
            with pytest.raises(UserError, match="cannot be written"):
                pretrained.save_weights(
                    tmp_path / "model" if kind == "full" else tmp_path, trained.model
                )
        finally:
            os.seteuid(user)
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            tmp_path.chmod(0o755)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.tmp"))
    after = outcome(tmp_path)
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert all(torch.equal(before[2][name], after[2][name]) for name in before[2])
    assert trained.lock is not None
    trained.lock.close()
    assert Run(config, World("cpu")).state.step == 10
    pretrained.load_model(tmp_path / "model")


# --- the start


@pytest.mark.slow
def test_chatlm_starts_from_the_lm_with_type_rows_drawn_anew(small: Path, tmp_path: Path) -> None:
    finish(start(small, "lm", tmp_path / "lm", "train.num_steps=5"))
    lm, _, _ = pretrained.load_model(tmp_path / "lm/model")
    settings = [
        f"init_from={tmp_path / 'lm/model'}",
        "model.n_layer=0",
        "model.n_head=0",
        "model.n_embd=0",
    ]
    config = config_of(small, "chatlm", tmp_path / "chat", *settings)
    for keep in (False, True):
        kept = dataclasses.replace(
            config, train=dataclasses.replace(config.train, keep_type_rows=keep)
        )
        rows = Run(kept, World("cpu")).model.wte.weight
        assert torch.equal(rows[2:], lm.wte.weight[2:])
        assert torch.equal(rows[:2], lm.wte.weight[:2]) == keep
    with pytest.raises(UserError, match="n_layer is 3"):
        Run(
            dataclasses.replace(config, model=dataclasses.replace(config.model, n_layer=3)),
            World("cpu"),
        )


def test_decay_is_on_matrices_only_and_muon_takes_those_of_the_blocks(small: Path) -> None:
    model = small_model()
    for kind in ("adamw", "muon"):
        config = load_config(str(small / "lm.toml"), [f"train.optimizer={kind}"]).train
        optimizers = make_optimizers(model, config)
        decayed, plain, embeddings = optimizers[0].param_groups
        assert embeddings["params"] == [model.wte.weight]
        assert all(p.dim() >= 2 for p in decayed["params"])
        assert all(p.dim() == 1 for p in plain["params"])
        decays = [group["weight_decay"] for group in (embeddings, decayed, plain)]
        assert decays == [0.1, 0.1, 0.0]
        count = sum(
            len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups
        )
        assert count == len(list(model.parameters()))
        if kind == "muon":
            fused, others = optimizers[1].param_groups
            assert fused["parts"] == 3 and {p.shape for p in fused["params"]} == {(96, 32)}
            assert (len(fused["params"]), len(others["params"])) == (2, 6)


def test_the_token_embedding_may_have_a_learning_rate_of_its_own(small: Path) -> None:
    for override, expected in (("0.0", 3e-3), ("1e-2", 1e-2)):
        overrides = ["train.optimizer=muon", f"train.embedding_learning_rate={override}"]
        config = load_config(str(small / "lm.toml"), overrides).train
        optimizers = make_optimizers(small_model(), config)
        set_learning_rate(optimizers, 0.5)
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        assert rates == pytest.approx([1.5e-3, 1.5e-3, expected / 2, 0.01, 0.01])


def test_the_learning_rate_warms_up_and_follows_its_schedule(small: Path) -> None:
    for schedule, middle in (("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)):
        config = load_config(
            str(small / "lm.toml"), ["train.warmup_ratio=0.1", f"train.schedule={schedule}"]
        ).train
        assert [lr_scale(step, 100, config) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
        assert lr_scale(55, 100, config) == pytest.approx(middle)
        assert lr_scale(100, 100, config) == pytest.approx(1.0 if schedule == "constant" else 0.0)


def test_the_count_of_operations_is_that_of_the_matrices() -> None:
    """The meter against PyTorch's own counter, forward and backward."""
    model = small_model().float()
    x = torch.zeros(2, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, target_positions=torch.arange(128), targets=x.flatten()).backward()
    assert step_flops(model.config, 128, 128, 64) == pytest.approx(
        counter.get_total_flops(), rel=0.05
    )


# --- wrong use


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.learning_rat=1"], "unknown key"),
        (["train.warmup_rate=0.1"], "warmup_ratio"),
        (["train.learning_rate=fast"], "wanted a number, above 0"),
        (["train.precision=fp8"], "wanted one of"),
        (["model.n_head=3"], "no multiple of n_head"),
        (["train.num_epochs=1"], "exactly one of num_epochs and num_steps"),
        (["tokenizer.dir=nowhere"], "nowhere"),
        (["data.shards=nowhere"], "nowhere"),
        (["init_from=nowhere"], "nowhere"),
        (["train.device=abacus"], "train.device"),
        (["run=/dev/null"], "/dev/null: File exists"),
        (["data.valid=[]"], "[data] valid: found no files named"),
    ],
)
def test_wrong_use_is_one_line_and_exit_status_2(
    small: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    output = run("train", "--config", small / "lm.toml", f"run={tmp_path}", *arguments, status=2)
    assert message in output and output.startswith("error: "), output
    assert output.count("\n") == 1, output


def test_shards_of_another_tokenizer_are_refused(small: Path, tmp_path: Path) -> None:
    other = f"tokenizer.dir={tmp_path}/tokenizer"
    run("tokenizer", "--config", small / "lm.toml", other, "tokenizer.vocab_size=390")
    text = (tmp_path / "tokenizer/tokenizer.json").read_text()
    assert text != (small / "tokenizer/tokenizer.json").read_text()
    output = run("train", "--config", small / "lm.toml", f"run={tmp_path}/run", other, status=2)
    assert "found shards of tokenizer" in output and output.count("\n") == 1, output

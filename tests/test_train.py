"""The loop: every target weighs the same, a resumed run is the same run, many processes are one."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import command, run, scalars, start_process, wait_until
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gptchat import train as loop
from gptchat.config import FREE_KEYS, load_config
from gptchat.console import RunFailed, UserError
from gptchat.data.batches import Batch, Batches
from gptchat.data.dialogue import encode_example
from gptchat.data.shards import open_shards
from gptchat.data.tokenizer import tokenizer_for
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.training import checkpoint
from gptchat.training.distributed import World
from gptchat.training.monitor import Monitor, step_flops
from gptchat.training.optim import lr_scale, make_optimizers, optimizer_state, set_learning_rate
from gptchat.training.start import Run
from gptchat.training.start import start as start_run

SHORT = ("train.num_steps=20", "train.eval_interval=10", "train.log_interval=5")
NEW_SIZE = ("model.n_layer=0", "model.n_head=0", "model.n_embd=0")


def make_run(small: Path, task: str, folder: Path, *overrides: str) -> Run:
    config = load_config(str(small / f"{task}.toml"), [f"run={folder}", *overrides])
    return start_run(config, World("cpu"))


def trained(small: Path, task: str, folder: Path, *overrides: str) -> Run:
    """A run that was trained in this process; its folder is free again."""
    made = make_run(small, task, folder, *overrides)
    if not made.done:
        loop.train(made)
    assert made.lock
    made.lock.close()
    return made


def start(
    small: Path, task: str, folder: Path, *overrides: str, processes: int = 1
) -> subprocess.Popen:
    """`gptchat train` as a process, or several by `torchrun -m gptchat.train`."""
    arguments = command("train", "--config", small / f"{task}.toml", f"run={folder}", *overrides)
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--nproc-per-node", str(processes)]
        arguments = [sys.executable, *torchrun, "-m", "gptchat.train", *arguments[4:]]
    return start_process(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


def n_reports(folder: Path) -> int:
    """How many lines of its log a run has written, with those that were lost."""
    files = (folder / "tensorboard").glob("*")
    return sum(path.read_bytes().count(b"train/loss") for path in files)


def mixture(small: Path) -> list[str]:
    """Settings of a ChatLM that learns all turns of two sources with weights."""
    sources = ", ".join(f'"{small}/data/chatlm/{split}.tsv"' for split in ("train", "valid"))
    settings = [f"data.train=[{sources}]", "data.weights=[0.3, 0.7]", "data.targets=turns"]
    settings += [f"data.shards={small}/mixed"]
    run("shards", "--config", small / "chatlm.toml", *settings)
    return settings


def small_model(vocab_size: int = 50, n_positions: int = 256) -> GPT2:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2}
    pdrop = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(vocab_size=vocab_size, n_positions=n_positions, **sizes, **pdrop)
    model = GPT2(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the gradients, which are cleared."""
    copies = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return copies


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= bound * max(1e-3, tensor.abs().max()), name


def files_of(folder: Path) -> list[dict[str, Tensor]]:
    names = ("checkpoint.safetensors", "model/model.safetensors")
    return [load_file(folder / name) for name in names]


def assert_same_run(folder: Path, other: Path) -> None:
    """Weights, optimizer state, best model and held-out losses are equal to the bit."""
    assert scalars(folder, "valid/loss") == scalars(other, "valid/loss")
    for ours, theirs in zip(files_of(folder), files_of(other), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- the loss


@pytest.mark.parametrize(("split", "targets"), [("valid", "response"), ("train", "turns")])
def test_packed_loss_and_gradients_are_the_sum_of_the_dialogues_one_by_one(
    small: Path, split: str, targets: str
) -> None:
    config = load_config(str(small / "chatlm.toml"))
    tokenizer = tokenizer_for(config)
    shards = open_shards(config, split, tokenizer)
    n_ctx = 1024
    model = small_model(tokenizer.vocab_size, n_ctx)
    packed = Batches([shards], tokenizer, n_ctx, 3, targets=targets)
    loss = model(**packed.micro_batch(0).inputs("cpu"))
    loss.backward()
    whole, total, n_examples = gradients(model), 0.0, 0
    for row in range(3):
        for dialogue, first, last in packed.orders[0].row(row):
            turns = shards.dialogue(dialogue)[first:last]
            one = encode_example(turns, tokenizer.cls_id, tokenizer.sep_id, n_ctx, targets)
            fields = (one.input_ids, one.token_type_ids, one.targets)
            ids, types, wanted = (torch.as_tensor(field).long() for field in fields)
            alone = model(input_ids=ids[None], token_type_ids=types[None], targets=wanted)
            alone.backward()
            total += float(alone.detach())
            n_examples += 1
    assert n_examples > 4
    assert float(loss.detach()) == pytest.approx(total, rel=1e-12)
    assert_close(gradients(model), whole, 1e-9)


@pytest.mark.parametrize("task", ["lm", "chatlm"])
def test_accumulated_micro_batches_give_the_gradient_of_the_whole(
    small: Path, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the mean loss. Targets are spread unevenly over the micro-batches of chat."""
    outcomes = []
    for rows, accumulation in ((12, 1), (1, 12)):
        settings = [f"train.batch_size={rows}", "model.dropout=0", "train.max_grad_norm=0"]
        settings += [f"train.gradient_accumulation_steps={accumulation}"]
        made = make_run(small, task, tmp_path / str(rows), *settings)
        monkeypatch.setattr(made.optimizer, "zero_grad", lambda: None)
        micro_batches = [made.train_batches.micro_batch(i) for i in range(accumulation)]
        made.model.double()
        if accumulation == 1:
            [batch] = micro_batches
            (made.model(**batch.inputs("cpu")) / batch.n_targets).backward()
            mean = gradients(made.model)
        loss_sum, _ = loop.train_step(made, micro_batches)
        outcomes.append((gradients(made.model), float(loss_sum)))
    (whole, loss), (accumulated, same_loss) = outcomes
    assert same_loss == pytest.approx(loss, rel=1e-9)
    assert_close(accumulated, whole, 1e-9)
    assert_close(whole, mean, 1e-9)


def test_dropout_differs_from_step_to_step_and_between_micro_batches(
    small: Path, tmp_path: Path
) -> None:
    settings = ["model.dropout=0.5", "train.gradient_accumulation_steps=2", "train.seed=3"]
    made = make_run(small, "lm", tmp_path, *settings)
    batch = made.train_batches.micro_batch(0)
    losses = []
    for step in (0, 1, 0):
        made.state.step = step
        micro_batches = [batch, made.train_batches.empty()], [made.train_batches.empty(), batch]
        for one in micro_batches:
            set_learning_rate(made.optimizer, 0.0)
            loss_sum, _ = loop.train_step(made, one)
            losses.append(float(loss_sum))
    assert len(set(losses[:4])) == 4
    assert losses[4:] == losses[:2]  # a resumed run draws the same


def test_a_micro_batch_without_targets_gives_zero() -> None:
    model = small_model()
    nothing = torch.zeros(0, dtype=torch.int64)
    loss = model(torch.zeros(2, 8, dtype=torch.int64), target_positions=nothing, targets=nothing)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients(model).values())


# --- resuming


@pytest.mark.slow
def test_a_run_killed_again_and_again_equals_an_uninterrupted_one(
    small: Path, tmp_path: Path
) -> None:
    settings = [*mixture(small), "train.num_steps=90", "train.eval_interval=10"]
    settings += ["train.optimizer=muon", "train.log_interval=1"]
    trained(small, "chatlm", tmp_path / "whole", *settings)
    killed = tmp_path / "killed"
    for lines in (13, 47):
        process = start(small, "chatlm", killed, *settings)
        wait_until(lambda lines=lines: n_reports(killed) >= lines, process)
        process.kill()
        process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, "the run ended before its last kill"
    trained(small, "chatlm", killed, *settings)
    assert_same_run(killed, tmp_path / "whole")
    assert scalars(killed, "train/loss") == scalars(tmp_path / "whole", "train/loss")


@pytest.mark.slow
def test_a_burst_of_a_signal_saves_and_the_same_command_goes_on(
    small: Path, tmp_path: Path
) -> None:
    settings = ["train.num_steps=150", "train.eval_interval=1000", "train.log_interval=1"]
    trained(small, "chatlm", tmp_path / "whole", *settings)
    process = start(small, "chatlm", tmp_path / "stopped", *settings)
    wait_until(lambda: n_reports(tmp_path / "stopped") > 0, process)
    for _ in range(5):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    assert "goes on from here" in finish(process, 130)
    trained(small, "chatlm", tmp_path / "stopped", *settings)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_began(small: Path, tmp_path: Path) -> None:
    settings = [*mixture(small), "model.dropout=0", "train.gradient_accumulation_steps=3"]
    settings += ["train.eval_interval=10"]
    trained(small, "chatlm", tmp_path / "one", *settings, "train.num_steps=30")
    two = tmp_path / "two"
    stopped = make_run(small, "chatlm", two, *settings, "train.num_steps=30")
    stopped.stop()
    loop.train(stopped)
    assert stopped.lock and stopped.state.step == 1
    stopped.lock.close()
    finish(start(small, "chatlm", two, *settings, "train.num_steps=30", processes=2))
    ours, theirs = (scalars(tmp_path / name, "valid/loss") for name in ("one", "two"))
    assert [step for step, _ in ours] == [step for step, _ in theirs] == [10, 20, 30]
    assert [x for _, x in ours] == pytest.approx([x for _, x in theirs], rel=1e-4)
    one, other = (files_of(tmp_path / name)[0] for name in ("one", "two"))
    names = [name for name in one if name.startswith("model.")]
    assert_close({name: other[name] for name in names}, {name: one[name] for name in names}, 1e-2)


def test_a_finished_run_says_so_and_another_config_is_refused_by_its_keys(
    small: Path, tmp_path: Path
) -> None:
    trained(small, "lm", tmp_path, *SHORT)
    output = run("train", "--config", small / "lm.toml", f"run={tmp_path}", *SHORT)
    assert "finished at step 20 of 20, best" in output and "raising train.num_steps" in output
    finished = make_run(small, "lm", tmp_path, *SHORT)
    assert finished.done and not hasattr(finished, "optimizer") and finished.lock
    finished.lock.close()
    with pytest.raises(UserError, match="found a checkpoint of step 20; the config wants only 12"):
        make_run(small, "lm", tmp_path, "train.num_steps=12")
    told = "model.n_embd was 32, is 64; train.weight_decay was 0.1, is 0.2;.*"
    with pytest.raises(UserError, match=told + ", ".join(sorted(FREE_KEYS))):
        make_run(small, "lm", tmp_path, *SHORT, "train.weight_decay=0.2", "model.n_embd=64")


def test_patience_keeps_the_best_model_and_says_what_trains_it_further(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = iter([3.0, 2.0, 2.5, 2.2, 1.0, 1.5, 1.5, 1.5])
    monkeypatch.setattr(loop, "sum_losses", lambda *arguments: (next(held_out), 1))
    settings = ["train.num_steps=100", "train.eval_interval=1"]
    ended = trained(small, "lm", tmp_path, *settings, "train.patience=2")
    best = ended.model_dir / "model.safetensors"
    assert ended.state.step == 4 and ended.state.best_loss == 2.0
    before = load_file(best)
    told = loop.describe_end(ended)
    assert "finished at step 4 of 100 by train.patience" in told
    assert "raising train.patience" in told
    again = trained(small, "lm", tmp_path, *settings, "train.patience=3")
    assert again.state.step == 8 and again.state.best_loss == 1.0
    assert not torch.equal(*(w["transformer.wte.weight"] for w in (before, load_file(best))))


@pytest.mark.parametrize("moment", ["at the end", "on the way"])
def test_a_best_model_that_was_moved_away_is_written_anew(
    small: Path, tmp_path: Path, moment: str
) -> None:
    first = trained(small, "lm", tmp_path, *SHORT)
    shutil.rmtree(first.model_dir)
    steps = 20 if moment == "at the end" else 23
    again = trained(small, "lm", tmp_path, f"train.num_steps={steps}", *SHORT[1:])
    model, _, _ = pretrained.load_model(again.model_dir)
    assert again.done and again.state.best_loss < 100
    assert model.config == first.model.config


def test_a_chat_run_goes_on_without_the_lm_it_started_from_but_not_from_another(
    small: Path, tmp_path: Path
) -> None:
    lm, chat = tmp_path / "lm", tmp_path / "chat"
    trained(small, "lm", lm, "train.num_steps=2")
    settings = [f"init_from={lm / 'model'}", *NEW_SIZE, "train.eval_interval=5"]
    trained(small, "chatlm", chat, *settings, "train.num_steps=5")
    lm.rename(tmp_path / "away")
    assert trained(small, "chatlm", chat, *settings, "train.num_steps=7").state.step == 7
    with pytest.raises(UserError, match="lm/model"):
        make_run(small, "chatlm", tmp_path / "new", *settings)
    trained(small, "lm", lm, "train.num_steps=3")
    with pytest.raises(UserError, match="text.init was"):
        make_run(small, "chatlm", chat, *settings)
    shutil.rmtree(lm)
    (tmp_path / "away").rename(lm)
    assert make_run(small, "chatlm", chat, *settings, "train.num_steps=9").state.step == 7


def test_a_second_run_on_the_same_folder_is_refused_and_removes_nothing(
    small: Path, tmp_path: Path
) -> None:
    first = make_run(small, "lm", tmp_path)
    being_written = tmp_path / ".checkpoint.safetensors.99999.tmp"
    being_written.write_bytes(b"part")
    with pytest.raises(UserError, match="another run is training here"):
        make_run(small, "lm", tmp_path)
    assert first.lock and being_written.exists()
    first.lock.close()
    make_run(small, "lm", tmp_path)
    assert not being_written.exists()


# --- the checkpoint


def test_optimizer_state_is_named_by_kind_and_parameter(small: Path, tmp_path: Path) -> None:
    made = trained(small, "lm", tmp_path, "train.num_steps=1", "train.optimizer=muon")
    state = optimizer_state(made.model, made.optimizer)
    assert "optimizer.adamw.h.0.ln_1.weight.exp_avg" in state
    assert "optimizer.muon.h.1.mlp.c_fc.weight.momentum_buffer" in state


def test_a_damaged_checkpoint_or_one_of_another_format_is_refused_in_one_line(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(small, "lm", tmp_path, "train.num_steps=2")
    path = checkpoint.path_in(tmp_path)
    content = path.read_bytes()
    damaged = [content[: len(content) // 2], content[:100], b""]
    for place in range(8, len(content), len(content) // 20):
        changed = bytearray(content)
        changed[place] ^= 1
        damaged.append(bytes(changed))
    for bad in damaged:
        path.write_bytes(bad)
        with pytest.raises(UserError, match="^[^\n]*checkpoint[^\n]*$"):
            make_run(small, "lm", tmp_path, "train.num_steps=3")
    path.write_bytes(content)
    assert make_run(small, "lm", tmp_path, "train.num_steps=3").state.step == 2
    monkeypatch.setattr(checkpoint, "CHECKPOINT_FORMAT", "99")
    with pytest.raises(UserError, match="found checkpoint format 5; wanted 99; [^\n]+anew$"):
        make_run(small, "lm", tmp_path)


# --- numbers that are not finite


@pytest.mark.parametrize("place", ["weight", "gradient", "stop"])
def test_a_value_that_is_not_finite_ends_the_run_before_anything_is_saved(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """`stop`: a signal asks for a checkpoint right after the weights went wrong."""
    plain_step, kept = loop.train_step, []

    def step(made: Run, micro_batches: list[Batch]) -> tuple[Tensor, Tensor]:
        if made.state.step == 11:
            kept.extend(files_of(tmp_path))
        loss_sum, grad_norm = plain_step(made, micro_batches)
        if made.state.step == 12:
            if place == "gradient":
                return loss_sum, grad_norm * torch.inf
            made.model.wte.weight.data[7, 3] = torch.nan
            made.stopped = place == "stop"
        return loss_sum, grad_norm

    monkeypatch.setattr(loop, "train_step", step)
    made = make_run(small, "lm", tmp_path, *SHORT)
    with pytest.raises(RunFailed, match="^[^\n]+(nan|inf)[^\n]+the last checkpoint and[^\n]+$"):
        loop.train(made)
    for before, after in zip(kept, files_of(tmp_path), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert scalars(tmp_path, "train/loss")[-1][0] == (13 if place == "stop" else 10)
    assert made.lock
    made.lock.close()
    monkeypatch.setattr(loop, "train_step", plain_step)
    slower = trained(small, "lm", tmp_path, *SHORT, "train.learning_rate=1e-3")
    assert slower.state.step == 20


@pytest.mark.parametrize("loss_sum", [torch.nan, torch.inf])
def test_a_held_out_loss_that_is_not_finite_ends_the_run(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_sum: float
) -> None:
    monkeypatch.setattr(loop, "sum_losses", lambda *arguments: (loss_sum, 7))
    with pytest.raises(RunFailed, match="held-out loss (nan|inf) at step 10"):
        trained(small, "lm", tmp_path, *SHORT)
    assert not checkpoint.path_in(tmp_path).exists()


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_an_overflow_of_fp16_in_one_optimizers_gradients_skips_the_step_of_all(
    small: Path, tmp_path: Path, max_grad_norm: float
) -> None:
    settings = ("train.precision=fp16", "train.optimizer=muon")
    made = make_run(small, "lm", tmp_path, *settings, f"train.max_grad_norm={max_grad_norm}")
    before = {name: value.clone() for name, value in made.model.state_dict().items()}

    def update(broken: Tensor | None) -> None:
        made.scaler.scale(torch.ones(()))
        for parameter in made.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        if broken is not None:
            broken.grad[0, 0] = torch.inf
        loop.update_weights(made)

    for broken in (made.model.wpe.weight, made.model.h[0].mlp.c_fc.weight):
        update(broken)
        after = made.model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)
    update(None)
    for name, parameter in made.model.named_parameters():
        assert not torch.equal(parameter, before[name]) and parameter.isfinite().all(), name


# --- switches


def test_half_precision_learns_as_fp32_does_and_may_go_on_from_it(
    small: Path, tmp_path: Path
) -> None:
    settings = ("train.num_steps=12", "train.eval_interval=4", "model.dropout=0")
    losses = {}
    for name in ("fp32", "bf16", "fp16"):
        trained(small, "lm", tmp_path / name, f"train.precision={name}", *settings)
        losses[name] = [loss for _, loss in scalars(tmp_path / name, "valid/loss")]
    assert losses["fp32"][-1] < losses["fp32"][0] - 0.2
    for name in ("bf16", "fp16"):
        assert losses[name] == pytest.approx(losses["fp32"], rel=0.02)
    longer = ("train.num_steps=14", "train.precision=fp16", "model.dropout=0")
    assert trained(small, "lm", tmp_path / "fp32", *longer).state.step == 14


@pytest.mark.slow
def test_compilation_changes_no_result(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for switch in ("true", "false"):
        settings = [f"train.compile={switch}", "model.dropout=0", "model.n_layer=1"]
        made = make_run(small, "chatlm", tmp_path / switch, *settings)
        monkeypatch.setattr(made.optimizer, "zero_grad", lambda: None)
        loop.train_step(made, [made.train_batches.micro_batch(0)])
        results.append(gradients(made.model))
    assert_close(*results, 1e-4)


def test_without_a_compiler_one_line_says_so_and_training_is_eager(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    made = make_run(small, "lm", tmp_path, "train.compile=true")
    assert made.training_model is made.model
    assert capsys.readouterr().err.count("training eagerly") == 1


# --- the start


def test_chatlm_starts_from_the_lm_with_type_rows_drawn_anew(small: Path, tmp_path: Path) -> None:
    lm = trained(small, "lm", tmp_path / "lm", "train.num_steps=5").model
    settings = [f"init_from={tmp_path / 'lm/model'}", *NEW_SIZE]
    rows = make_run(small, "chatlm", tmp_path / "chat", *settings).model.wte.weight
    assert torch.equal(rows[2:], lm.wte.weight[2:])
    assert not torch.equal(rows[:2], lm.wte.weight[:2])
    with pytest.raises(UserError, match="n_layer is 3"):
        make_run(small, "chatlm", tmp_path / "other", *settings, "model.n_layer=3")


def test_decay_is_on_matrices_only_and_muon_takes_those_of_the_blocks(small: Path) -> None:
    model = small_model()
    for kind in ("adamw", "muon"):
        config = load_config(str(small / "lm.toml"), [f"train.optimizer={kind}"]).train
        optimizers = make_optimizers(model, config)
        decayed, plain, embeddings, *of_muon = optimizers.param_groups
        assert embeddings["params"] == [model.wte.weight]
        assert all(p.dim() >= 2 for p in decayed["params"])
        assert all(p.dim() == 1 for p in plain["params"])
        assert [group["weight_decay"] for group in (embeddings, decayed, plain)] == [0.1, 0.1, 0.0]
        count = sum(len(group["params"]) for group in optimizers.param_groups)
        assert count == len(list(model.parameters()))
        if kind == "muon":
            fused, others = of_muon
            assert fused["parts"] == 3 and {p.shape for p in fused["params"]} == {(96, 32)}
            assert (len(fused["params"]), len(others["params"])) == (2, 6)


def test_the_learning_rate_warms_up_and_follows_its_schedule(small: Path) -> None:
    for schedule, middle, end in (("linear", 0.5, 0), ("cosine", 0.5, 0), ("constant", 1, 1)):
        settings = ["train.warmup_ratio=0.1", f"train.schedule={schedule}", "train.optimizer=muon"]
        config = load_config(
            str(small / "lm.toml"), [*settings, "train.embedding_learning_rate=1e-2"]
        ).train
        assert [lr_scale(step, 100, config) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
        assert lr_scale(55, 100, config) == pytest.approx(middle)
        assert lr_scale(100, 100, config) == pytest.approx(end)
    optimizers = make_optimizers(small_model(), config)
    set_learning_rate(optimizers, 0.5)
    rates = [group["lr"] for one in optimizers.optimizers for group in one.param_groups]
    assert rates == pytest.approx([1.5e-3, 1.5e-3, 5e-3, 0.01, 0.01])


def test_the_count_of_operations_is_that_of_the_matrices() -> None:
    """The meter against PyTorch's own counter, forward and backward."""
    model = small_model().float()
    x = torch.zeros(2, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, target_positions=torch.arange(128), targets=x.flatten()).backward()
    counted = counter.get_total_flops()
    assert step_flops(model.config, 128, 128, 64) == pytest.approx(counted, rel=0.05)


# --- what cannot be written, wrong use


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_the_old_one_stays(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(small, "lm", tmp_path, *SHORT)
    before = files_of(tmp_path)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    made = make_run(small, "lm", tmp_path, "train.num_steps=25", *SHORT[1:])
    with pytest.raises(UserError, match="^[^\n]*cannot be written: [^\n]*No space[^\n]*$"):
        loop.train(made)
    assert not list(tmp_path.rglob("*.tmp"))
    for ours, theirs in zip(before[:1], files_of(tmp_path), strict=False):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.learning_rat=1"], "unknown key"),
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


# --- what a run reports


@pytest.fixture(scope="module")
def chat_run(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A ChatLM's run that was stopped after the first of twenty steps and went on."""
    folder = tmp_path_factory.mktemp("runs") / "chat"
    stopped = make_run(small, "chatlm", folder, *SHORT)
    stopped.stop()
    loop.train(stopped)
    assert stopped.stopped and stopped.lock
    stopped.lock.close()
    return trained(small, "chatlm", folder, *SHORT)


def test_tensorboard_has_each_figure_once_however_often_a_run_was_stopped(chat_run: Run) -> None:
    per_step = [chat_run.train_batches.micro_batch(number).n_tokens for number in range(20)]
    tokens = [(step, sum(per_step[:step])) for step in (1, 5, 10, 15, 20)]
    assert scalars(chat_run.folder, "train/tokens") == tokens
    assert [step for step, _ in scalars(chat_run.folder, "valid/loss")] == [10, 20]
    for name in ("mfu", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_gb"):
        assert all(value > 0 for _, value in scalars(chat_run.folder, f"train/{name}")), name
    content = b"".join(path.read_bytes() for path in chat_run.folder.glob("tensorboard/*"))
    assert b"train.learning_rate = 0.003" in content


def test_what_only_reports_ends_no_run(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a folder where a file should be, nor names that are not UTF-8."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "tensorboard").write_text("a file")
    made = trained(small, "lm", folder, *SHORT)
    assert made.state.step == 20
    assert capsys.readouterr().err.count("warning: TensorBoard: ") == 1
    other = trained(small, "lm", tmp_path / os.fsdecode(b"\xe9"), *SHORT)
    assert n_reports(other.folder) == 4  # (TensorBoard itself cannot read such a folder)


def test_a_full_disk_under_tensorboard_is_one_warning(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_run(small, "lm", tmp_path)
    with Monitor(made) as monitor:
        assert monitor.board
        monitor.board._writer.close()
        monitor.board._writer = open("/dev/full", "wb", buffering=0)
        for _ in range(2):
            monitor.report_training(torch.zeros(()))
    assert capsys.readouterr().err.count("warning: TensorBoard: ") == 1

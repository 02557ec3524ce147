"""What a GPU needs, as far as a CPU can test it: where tensors are made, what waits for the device,
which device and dtype a process takes, and how often a model is compiled.

The device of these tests is "meta": torch computes shapes there and refuses to mix it with the CPU,
as a GPU does, and a number cannot be read from it.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptchat.config import TrainConfig, load_config
from gptchat.console import UserError
from gptchat.data.batches import Batches
from gptchat.data.shards import open_sources
from gptchat.data.tokenizer import tokenizer_for
from gptchat.inference import draw
from gptchat.inference.engine import Engine, Request
from gptchat.inference.sampling import Sampling
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.runtime import multiplies_bfloat16
from gptchat.train import train_step
from gptchat.training import optim, start
from gptchat.training.distributed import World, usable_device, wrap_model
from gptchat.training.metrics import resolve_precision
from gptchat.training.monitor import Monitor
from gptchat.training.muon import Muon

META = torch.device("meta")
V, LENGTH = 100, 50


# Operators that copy a tensor to another device; the second is seen in inference mode only.
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype_layout)


class DeviceWatch(TorchDispatchMode):
    """Counts, by operator, what reads a tensor of `device`, and lists tensors made elsewhere.

    A number that is read is 1.0, since meta tensors hold none.
    """

    def __init__(self, device: torch.device = META):
        super().__init__()
        self.device = device
        self.reads: Counter[str] = Counter()
        self.strangers: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in inputs if tensor.device == self.device]
        if function is torch.ops.aten._local_scalar_dense.default and on_device:
            self.reads[str(function)] += 1
            return 1.0
        if function in COPIES and on_device:
            if kwargs.get("device", self.device) != self.device:
                self.reads[str(function)] += 1
                return torch.zeros(inputs[0].shape, dtype=kwargs.get("dtype") or inputs[0].dtype)
        if function is torch.ops.aten.nonzero.default and on_device:
            self.reads[str(function)] += 1  # and raises: its size depends on what it reads
        output = function(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.strangers += [str(function) for tensor in made if tensor.device != self.device]
        return output


def model_on(device: torch.device, **changes: Any) -> GPT2:
    settings = dict(vocab_size=V, n_positions=256, n_embd=32, n_layer=2, n_head=2)
    dropout = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    torch.manual_seed(0)
    return GPT2(GPT2Config(**(settings | dropout | changes))).to(device)


def packed_arguments(
    device: torch.device, n_targets: int, rows: int = 3, length: int = LENGTH
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n_targets)
    ids = torch.randint(V, (rows, length), generator=generator)
    segments = torch.randint(-1, 4, (rows, length), generator=generator, dtype=torch.int32)
    arguments = {
        "input_ids": ids,
        "token_type_ids": ids % 2,
        "segments": segments.sort(1).values,
        "position_ids": torch.arange(length).repeat(rows, 1),
        "target_positions": torch.arange(n_targets),
        "targets": ids.flatten()[:n_targets],
    }
    return {name: tensor.to(device) for name, tensor in arguments.items()}


# --- tensors are made on the device of the model


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_step_of_muon_makes_no_tensor_on_another_device(is_packed: bool) -> None:
    model = model_on(META, embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1).train()
    arguments = packed_arguments(META, 70)
    if not is_packed:
        del arguments["segments"], arguments["position_ids"]
    optimizer = unfused_optimizers(model, TrainConfig(optimizer="muon"))
    with DeviceWatch() as watch:
        model(**arguments).backward()
        optim.clip_gradients(model, 1.0)
        optimizer.optimizers[1].step()
    assert not watch.strangers
    assert not watch.reads
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_pass_with_a_cache_makes_no_tensor_on_another_device() -> None:
    model = model_on(META).eval()
    cache = model.kv_cache(slots=4, length=64, dtype=torch.float32)
    start = torch.empty(3, dtype=torch.int64, device=META)
    ids = torch.empty(3, 5, dtype=torch.int64, device=META)
    with torch.no_grad(), DeviceWatch() as watch:
        hidden = model.hidden(ids, ids, cache=cache.view(0, start, n_new=5, length=37))
        model.logits(hidden)
    assert not watch.strangers
    assert not watch.reads


EVERY_SETTING = Sampling(
    temperature=0.7,
    top_k=40,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.2,
    frequency_penalty=0.1,
    presence_penalty=0.1,
    min_tokens=5,
    logit_bias={7: 1.0, 8: -100.0},
)


@pytest.mark.parametrize(
    "settings, n_reads",
    [([Sampling(temperature=0)], 2), ([EVERY_SETTING, replace(EVERY_SETTING, top_k=0)] * 4, 3)],
)
def test_a_decoding_step_reads_from_the_device_as_often_for_many_rows_as_for_one(
    settings: list[Sampling], n_reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the ids, their log-probabilities, and with top-p whether an id is outside of it."""

    def none_outside(*arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *found, is_outside = heavier(*arguments)
        return *found, torch.zeros_like(is_outside)

    heavier = draw.heavier
    monkeypatch.setattr(draw, "heavier", none_outside)
    engine = Engine(model_on(META), slots=len(settings), length=64, suppress=(0, 1))
    for sampling in settings:
        sampling = replace(sampling, logprobs=5, max_new_tokens=50)
        engine.submit(Request([5, 6, 7], sampling=sampling, stop_ids=(2,)))
    with DeviceWatch():
        engine.step()
    with DeviceWatch() as watch:
        assert len(engine.step()) == len(settings)
    assert watch.reads.total() == n_reads


def unfused_optimizers(model: GPT2, config: TrainConfig) -> optim.Optimizers:
    """AdamW, which has no fused kernel for "meta", and Muon."""

    class Unfused(torch.optim.AdamW):
        def __init__(self, groups: Any, fused: bool, **settings: Any):
            super().__init__(groups, capturable=False, foreach=False, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "AdamW", Unfused)
        return optim.make_optimizers(model, config)


@pytest.mark.parametrize("task", ["lm", "chatlm"])
def test_a_training_step_reads_nothing_from_the_device_but_for_the_log(
    small: Path, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [f"run={tmp_path}", "train.device=meta", "train.gradient_accumulation_steps=2"]
    config = load_config(str(small / f"{task}.toml"), [*settings, "train.optimizer=muon"])
    monkeypatch.setattr("gptchat.training.start.make_optimizers", unfused_optimizers)
    trained = start.start(config, World(config.train.device))
    watched = Monitor(trained)
    steps = [[trained.train_batches.micro_batch(2 * n + i) for i in range(2)] for n in range(3)]
    with DeviceWatch() as watch:
        for micro_batches in steps:
            loss_sum, grad_norm = train_step(trained, micro_batches)
            watched.count_step(micro_batches, loss_sum, grad_norm)
        assert not watch.reads
        watched.report_training(grad_norm)
    assert set(watch.reads) == {"aten._local_scalar_dense.default"}
    assert watch.reads.total() == 3  # the loss, the largest gradient norm and the last one


# --- compilation


def test_one_graph_serves_all_batches_of_dialogues(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(str(small / "chatlm.toml"))
    tokenizer = tokenizer_for(config)
    sources = open_sources(config, "train", tokenizer)
    monkeypatch.setattr("gptchat.data.batches.TARGETS_MULTIPLE", 8)  # more sizes in few batches
    batches = Batches(sources, tokenizer, 64, 4)
    arguments = [batches.micro_batch(number).inputs("cpu") for number in range(6)]
    sizes = {(*a["input_ids"].shape, *a["targets"].shape) for a in arguments}
    assert len(sizes) > 1
    model = model_on(torch.device("cpu"), vocab_size=tokenizer.vocab_size)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend=backend))
    torch.compiler.reset()
    with torch.compiler.config.patch(dynamic_sources=""):
        settings = TrainConfig(compile=True)
        wrapped = wrap_model(model, settings, World("cpu"), batches.varying_dimensions)
        for of_batch in arguments:
            wrapped(**of_batch).backward()
    assert len(graphs) == 1


# --- devices


def test_a_process_chooses_its_gpu_before_it_makes_a_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(torch, "empty", lambda *shape, device: calls.append(("empty", device)))
    for name, rank, index in (
        ("auto", 3, 3),
        ("cuda", 1, 1),
        ("cuda:2", None, 2),
        ("cuda", None, 0),
    ):
        calls.clear()
        device = torch.device("cuda", index)
        assert usable_device(name, rank) == device
        assert calls == [device, ("empty", device)]


def test_a_gpu_that_is_not_there_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="train.device: found 'cuda:7'; wanted auto, cpu or cuda"):
        usable_device("cuda:7")


def test_auto_takes_no_bfloat16_that_a_gpu_emulates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert not multiplies_bfloat16(torch.device("cuda"))
    assert resolve_precision("auto", "cuda") == "fp32"


@pytest.mark.parametrize(
    ("capabilities", "precision", "dtype"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "fp32", torch.float32),
        ({"amx_bf16": True}, "bf16", torch.bfloat16),
        ({}, "fp32", torch.float32),  # of another architecture
    ],
)
def test_auto_trains_in_bfloat16_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict, precision: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", "cpu") == precision
    model = GPT2(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    _, muon = optim.make_optimizers(model, TrainConfig(optimizer="muon")).optimizers
    assert isinstance(muon, Muon) and muon.dtype == dtype

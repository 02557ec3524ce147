"""The inference kernels: how close to F.linear they are, and what happens where one is missing."""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptchat.console import UserError
from gptchat.inference import linear as linear_module
from gptchat.inference.engine import Engine, Request, generate
from gptchat.inference.linear import (
    Int8Linear,
    PackedLinear,
    PlainLinear,
    fast_linear,
    kernel_works,
    onednn_supports,
    prepare_for_inference,
)
from gptchat.inference.sampling import Sampling
from gptchat.model.gpt2 import GPT2, GPT2Config

ROOT = Path(__file__).resolve().parent.parent
SMALL = GPT2Config(vocab_size=311, n_positions=64, n_embd=64, n_layer=3, n_head=4)
# of one layer's output, relative, in the 2-norm
ROUNDING = {"float32": 1e-6, "bfloat16": 6e-3, "int8": 2.5e-2}
NEIGHBOUR_ROUNDING = {"float32": 1e-6, "bfloat16": 4e-3, "int8": 1e-6}


@pytest.fixture(autouse=True)
def untried_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts as a new process does: no kernel has been tried, no fallback reported."""
    kernel_works.cache_clear()
    yield
    kernel_works.cache_clear()


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", ROUNDING)
def test_this_torch_has_every_kernel_that_the_machine_supports(dtype, capsys):
    supported = dtype != "bfloat16" or onednn_supports(torch.bfloat16)
    kernel = Int8Linear if dtype == "int8" else PackedLinear
    layer = fast_linear(nn.Linear(8, 8), dtype)
    assert type(layer) is (kernel if supported else PlainLinear)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("n_in", "n_out", "bias"), [(768, 2304, True), (3072, 768, True), (64, 311, False)]
)
@pytest.mark.parametrize("rows", [1, 32])
@torch.inference_mode()
def test_kernels_equal_f_linear_within_their_rounding(dtype, n_in, n_out, bias, rows):
    torch.manual_seed(0)
    linear = nn.Linear(n_in, n_out, bias)
    sizes = torch.logspace(-2, 2, rows)[:, None]  # rows of very different size
    x = torch.randn(rows, n_in) * sizes
    found, wanted = fast_linear(linear, dtype)(x), linear(x)
    assert found.dtype == torch.float32
    assert max(map(distance, found, wanted)) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING)
@torch.inference_mode()
def test_a_row_does_not_depend_on_its_neighbours(dtype):
    torch.manual_seed(0)
    layer = fast_linear(nn.Linear(768, 300), dtype)
    row = torch.randn(1, 768)
    alone = layer(row)[0]
    for neighbours in (1, 7, 31, 200):
        for size in (1e-3, 1e3):
            rows = torch.cat([torch.randn(neighbours, 768) * size, row])
            assert distance(layer(rows)[-1], alone) < NEIGHBOUR_ROUNDING[dtype]


# `Int8Linear` itself, since a kernel that gives wrong numbers here is not used by `fast_linear`.


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize(("n_in", "n_out", "bias"), [(768, 300, True), (33, 5, False)])
@torch.inference_mode()
def test_int8_has_a_scale_per_row_and_per_output(n_in, n_out, bias, vnni, monkeypatch):
    if vnni and not torch.cpu._is_vnni_supported():
        pytest.skip("this CPU would saturate")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    torch.manual_seed(0)
    sizes = torch.logspace(-2, 2, n_out)[:, None]
    weight = torch.randn(n_out, n_in) * sizes
    layer = Int8Linear(weight, torch.randn(n_out) if bias else None)
    x = torch.randn(9, n_in) * torch.logspace(-3, 3, 9)[:, None]
    row_scales = x.abs().amax(1, keepdim=True) / 127
    output_scales = weight.abs().amax(1) / (127 if vnni else 64)
    products = (x / row_scales).round().double() @ (weight.T / output_scales).round().double()
    wanted = products * row_scales * output_scales + (layer.bias if bias else 0)
    # A number half-way between two integers may become either.
    assert max(map(distance, layer(x), wanted)) < 1e-3


@torch.inference_mode()
def test_int8_row_is_the_same_to_the_bit_in_any_company():
    torch.manual_seed(0)
    layer = Int8Linear(torch.randn(311, 768), torch.randn(311))
    row = torch.randn(1, 768)
    alone = layer(row)[0]
    for neighbours in (1, 2, 7, 31, 200):
        for size in (1e-3, 1, 1e3):
            rows = torch.randn(neighbours, 768) * size
            for place in (0, neighbours // 2, neighbours):
                found = layer(torch.cat([rows[:place], row, rows[place:]]))
                assert torch.equal(found[place], alone)


@torch.inference_mode()
def test_int8_sums_of_the_largest_products_do_not_saturate():
    layer = Int8Linear(torch.full((8, 768), 3.0), None)
    for x in (torch.full((1, 768), 2.0), torch.full((1, 768), -2.0)):
        assert distance(layer(x), 768 * 3 * x[:, :8]) < 1e-5


@torch.inference_mode()
def test_int8_keeps_a_row_of_zeros_and_the_shape():
    layer = fast_linear(nn.Linear(16, 8), "int8")
    assert torch.equal(layer(torch.zeros(2, 3, 16)), layer.bias.expand(2, 3, 8))


@torch.inference_mode()
def test_without_onednn_the_linear_layers_are_plain(monkeypatch, capsys):
    monkeypatch.setattr(linear_module, "onednn_supports", lambda dtype: False)
    linear, x = nn.Linear(64, 32), torch.randn(4, 64)
    assert torch.equal(fast_linear(linear, "float32")(x), linear(x))
    assert distance(fast_linear(linear, "bfloat16")(x), linear(x)) < ROUNDING["bfloat16"]
    assert capsys.readouterr().err == ""  # the machine's lack, not a change of torch


# A private API of torch that is missing, raises, or gives wrong numbers


class Operators:
    """A namespace of torch.ops in which one operator is another one, or missing (None)."""

    def __init__(self, namespace: Any, name: str, replacement: Any):
        self.namespace, self.name, self.replacement = namespace, name, replacement

    def __getattr__(self, name: str) -> Any:
        if name != self.name:
            return getattr(self.namespace, name)
        if self.replacement is None:
            raise AttributeError(f"no operator {name}")
        return self.replacement


def replace_operator(
    monkeypatch: pytest.MonkeyPatch, namespace: str, name: str, replacement: Any
) -> None:
    operators = Operators(getattr(torch.ops, namespace), name, replacement)
    monkeypatch.setattr(torch.ops, namespace, operators)


def raising(*arguments: Any) -> Any:
    raise RuntimeError("schema\nhas changed")


def doubling(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: kernel(*arguments) * 2


def as_operator(kernel: Callable[..., Tensor]) -> SimpleNamespace:
    return SimpleNamespace(default=SimpleNamespace(_op=kernel))


IS_BF16_SUPPORTED = ("mkldnn", "_is_mkldnn_bf16_supported")
REORDER = ("mkldnn", "_reorder_linear_weight")
ONEDNN = ("mkldnn", "_linear_pointwise")
PREPACK = ("quantized", "linear_prepack")
FBGEMM = ("quantized", "linear_with_input_q_dq_qweight_dq_output_fp32")
ONEDNN_OP = torch.ops.mkldnn._linear_pointwise.default._op
FBGEMM_OP = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default._op
CHANGED_OPERATORS = [  # (dtype, (namespace, operator), what is there now)
    ("float32", REORDER, None),
    ("float32", REORDER, lambda weight: weight.flip(0)),
    ("float32", ONEDNN, as_operator(doubling(ONEDNN_OP))),
    ("bfloat16", IS_BF16_SUPPORTED, None),
    ("bfloat16", ONEDNN, as_operator(raising)),
    ("int8", PREPACK, None),
    ("int8", FBGEMM, SimpleNamespace(default=object())),
    ("int8", FBGEMM, as_operator(doubling(FBGEMM_OP))),
]


def answers(model: GPT2, dtype: str) -> list[Any]:
    """What two engines say to two requests, with the log-probabilities."""
    sampling = Sampling(temperature=0, max_new_tokens=8, logprobs=3)
    requests = [Request([1, 2, 3], sampling=sampling), Request([7] * 20, sampling=sampling)]
    return [generate(Engine(model, slots=2, dtype=dtype), requests) for _ in range(2)]


def answers_of_f_linear(model: GPT2, dtype: str) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_module, "kernel_works", lambda dtype: False)
        return answers(model, dtype)


def assert_one_warning(stderr: str) -> None:
    assert stderr.count("\n") == 1 and stderr.startswith(f"warning: torch {torch.__version__} ")


@pytest.mark.parametrize(("dtype", "operator", "replacement"), CHANGED_OPERATORS)
def test_f_linear_answers_with_one_warning_where_an_operator_has_changed(
    dtype, operator, replacement, monkeypatch, capsys
):
    has_kernel = dtype != "bfloat16" or onednn_supports(torch.bfloat16)
    if not has_kernel and operator != IS_BF16_SUPPORTED:
        pytest.skip("this CPU has no oneDNN kernel for bfloat16 that could change")
    torch.manual_seed(0)
    model = GPT2(SMALL)
    expected = answers_of_f_linear(model, dtype)
    replace_operator(monkeypatch, *operator, replacement)
    assert answers(model, dtype) == expected
    error = capsys.readouterr().err
    assert_one_warning(error)
    assert "F.linear" in error


def test_private_torch_is_used_in_linear_alone():
    private = re.compile(r"\btorch(\.[a-z]+)*\._(?!_)|\btorch\.ops\.|\._op\b")
    users = [
        path.relative_to(ROOT).as_posix()
        for folder in ("gptchat", "handlers")
        for path in (ROOT / folder).glob("**/*.py")
        if private.search(path.read_text(encoding="utf-8"))
    ]
    assert users == ["gptchat/inference/linear.py"]


# Whole models


@pytest.mark.parametrize("dtype", ROUNDING)
@torch.inference_mode()
def test_a_prepared_model_computes_the_same_with_and_without_a_cache(dtype):
    torch.manual_seed(0)
    model = GPT2(SMALL).eval()
    ids, types = torch.randint(311, (2, 9)), torch.randint(2, (2, 9))
    wanted = model.logits(model.hidden(ids, types))
    before = [p.clone() for p in model.parameters()]
    prepared = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    cache = model.kv_cache(slots=2, length=16, dtype=prepare_for_inference(prepared, dtype))
    first = cache.view(0, torch.zeros(2, dtype=torch.int64), 5, 5)
    pieces = [prepared.hidden(ids[:, :5], types[:, :5], cache=first)]
    second = cache.view(0, torch.full((2,), 5), 4, 9)
    pieces += [prepared.hidden(ids[:, 5:], types[:, 5:], cache=second)]
    for hidden in (prepared.hidden(ids, types), torch.cat(pieces, dim=1)):
        logits = prepared.logits(hidden)
        assert logits.dtype == torch.float32 and distance(logits, wanted) < 4 * ROUNDING[dtype]
    # what it shared is whole
    assert all(map(torch.equal, before, model.parameters()))
    assert torch.equal(model.logits(model.hidden(ids, types)), wanted)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(UserError, match="dtype is 'int4'; wanted auto, float32, bfloat16, int8"):
        prepare_for_inference(GPT2(SMALL), "int4")


@pytest.mark.parametrize(
    "engines, bfloat16, kernel",
    [
        (["onednn", "fbgemm"], True, Int8Linear),
        (["onednn", "fbgemm"], False, Int8Linear),
        (["onednn"], True, torch.bfloat16),
        (["onednn"], False, torch.float32),
    ],
)
def test_auto_is_the_fastest_that_the_cpu_multiplies(monkeypatch, engines, bfloat16, kernel):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": bfloat16})
    quantized = SimpleNamespace(supported_engines=engines)
    monkeypatch.setattr("torch.backends.quantized", quantized)
    monkeypatch.setattr(linear_module, "kernel_works", lambda dtype: dtype == "int8")
    model = GPT2(SMALL)
    prepare_for_inference(model, "auto")
    layer = model.h[0].mlp.c_fc
    assert type(layer) is kernel if kernel is Int8Linear else layer.dtype == kernel

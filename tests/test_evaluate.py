"""Losses against plain loops over transformers' models; bits per byte for unlike tokenizers."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import byte_tokenizer, random_gpt2, write
from huggingface_hub import ModelCard
from transformers import GPT2LMHeadModel

from gptchat import evaluate
from gptchat.config import Config, DataConfig, TokenizerConfig, load_config
from gptchat.console import cli
from gptchat.data import shards, tokenizer
from gptchat.data.batches import Batches
from gptchat.figures import distinct, loss_figures, repeats_context, repeats_itself
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.training.metrics import metrics, sum_losses

torch.set_num_threads(1)

DOCUMENTS = [
    "The first speech.\nIt has two lines, and is longer than a window.",
    "Naïve 日本語 😎 text.",
    "The end.",
]
DIALOGUES = [
    ["Hi, how are you?", "I am well, thank you."],
    ["Really?", "Yes.", "And you?", "Me too, my friend."],
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(DOCUMENTS) + "\n", encoding="utf-8")
    return path


def run(*arguments: object) -> Any:
    """The figures that the command prints."""
    args = evaluate.parse_arguments(list(map(str, arguments)))
    config = load_config(args.config, args.overrides) if args.config else Config()
    return evaluate.evaluate(args, config)


def plain_loop(model: GPT2LMHeadModel, stream: list[int], n_ctx: int) -> tuple[float, int]:
    """The sum of losses over consecutive windows, and its number of targets.

    Each token is predicted from those before it in its window.
    """
    total, n = 0.0, 0
    for start in range(0, len(stream) - 1, n_ctx):
        ids = torch.tensor([stream[start : start + n_ctx + 1]])
        with torch.no_grad():
            logprobs = model(ids[:, :-1]).logits.log_softmax(-1)
        total -= float(logprobs.gather(2, ids[:, 1:, None]).sum())
        n += ids.shape[1] - 1
    return total, n


@pytest.mark.parametrize(
    "special", [("<|endoftext|>",), ("[PAD]", "[UNK]", "[BOS]", "[EOS]", "[CLS]", "[SEP]")]
)
def test_perplexity_of_anyones_gpt2_equals_a_plain_loop(tmp_path, text, special):
    model, vocabulary = random_gpt2(1, torch.float32), byte_tokenizer(special)
    directory = write(model, tmp_path / "model", vocabulary)
    found = run("--model", directory, "--text", text)[str(text)]
    stream = [vocabulary.eos_id]
    for document in DOCUMENTS:
        stream += [*vocabulary.encode(document), vocabulary.eos_id]
    total, n = plain_loop(model, stream, 48)
    assert found["n_targets"] == n == len(stream) - 1
    assert found["n_bytes"] == sum(len(document.encode()) for document in DOCUMENTS)
    assert found["perplexity"] == pytest.approx(math.exp(total / n), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / found["n_bytes"], rel=1e-5)


def test_a_chat_models_loss_equals_a_plain_loop_over_its_dialogues(tmp_path):
    model, vocabulary = random_gpt2(2, torch.float32, n_positions=80), byte_tokenizer()
    directory = write(model, tmp_path / "model", vocabulary)
    ours = json.loads((directory / "config.json").read_text()) | {
        "gptchat": {"task": "chatlm", "type_rows": [0, 1]}
    }
    (directory / "config.json").write_text(json.dumps(ours))
    path = tmp_path / "chat.tsv"
    path.write_text("".join("\t".join(turns) + "\n" for turns in DIALOGUES))
    found = run("--model", directory, "--text", path)[str(path)]
    total, n = 0.0, 0
    for turns in DIALOGUES:
        ids, types = [], []
        for i, turn in enumerate(turns):
            part = [vocabulary.sep_id] * (i > 0) + vocabulary.encode(turn)
            ids, types = ids + part, types + [(len(turns) - i) % 2] * len(part)
        wanted = [*vocabulary.encode(turns[-1]), vocabulary.cls_id]
        with torch.no_grad():
            logits = model(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits[
                0, -len(wanted) :
            ]
        total -= float(logits.log_softmax(-1)[range(len(wanted)), wanted].sum())
        n += len(wanted)
    assert found["n_targets"] == n and found["n_answers"] == len(DIALOGUES)
    assert found["perplexity"] == pytest.approx(math.exp(total / n), rel=1e-4)
    assert 0 <= found["distinct_1"] <= 1 and found["words_per_answer"] >= 0
    assert found == run("--model", directory, "--text", path)[str(path)]  # answers too


def uniform_over_bytes(directory: Path, vocabulary: tokenizer.Tokenizer) -> float:
    """A model to which a token of n bytes is 256 times as likely as one of n + 1; [EOS] has one.

    Returns the bits that it loses per token because all this adds up to more than 1.
    """
    model = GPT2(
        GPT2Config(vocab_size=vocabulary.vocab_size, n_positions=32, n_embd=8, n_layer=1, n_head=2)
    )
    lengths = torch.tensor([float(len(piece)) for piece in vocabulary.token_bytes])
    lengths[vocabulary.eos_id] = 1
    lengths[lengths == 0] = 100  # never
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(torch.eye(8)[0])
        model.wte.weight[:, 0] = -lengths * math.log(256)
    pretrained.save_static(directory, model.config, vocabulary, "lm")
    pretrained.save_weights(directory, model)
    return math.log2(float((256.0**-lengths).sum()))


def test_bits_per_byte_do_not_depend_on_the_tokenizer(tmp_path, text):
    longer = tokenizer.train_tokenizer(TokenizerConfig(vocab_size=300, files=(str(text),)))
    assert len(longer.encode(DOCUMENTS[0])) < 0.8 * len(byte_tokenizer().encode(DOCUMENTS[0]))
    found = {}
    for name, vocabulary in (("bytes", byte_tokenizer()), ("longer", longer)):
        lost = uniform_over_bytes(tmp_path / name, vocabulary)
        figures = run("--model", tmp_path / name, "--text", text)[str(text)]
        wanted = (
            8 * (figures["n_bytes"] + len(DOCUMENTS)) + lost * figures["n_targets"]
        )  # 8 bits a byte and an [EOS]
        assert figures["bits_per_byte"] == pytest.approx(wanted / figures["n_bytes"], rel=1e-5)
        found[name] = figures
    assert found["bytes"]["n_bytes"] == found["longer"]["n_bytes"]
    assert found["bytes"]["bits_per_byte"] == pytest.approx(
        found["longer"]["bits_per_byte"], abs=0.01
    )
    assert (
        found["bytes"]["loss"] < 0.8 * found["longer"]["loss"]
    )  # which therefore compares nothing


def test_losses_are_sums_without_dropout_whatever_the_batch_size(tmp_path, text):
    vocabulary = byte_tokenizer()
    vocabulary.save(tmp_path / "tokenizer")
    config = Config(init_from=str(tmp_path / "tokenizer"))
    config = replace(
        config, data=replace(config.data, test=(str(text),), shards=str(tmp_path / "s"))
    )
    shards.write(config)
    split = shards.open_shards(config, "test", vocabulary)
    model = GPT2(
        GPT2Config(vocab_size=vocabulary.vocab_size, n_positions=32, n_embd=8, n_layer=1, n_head=2)
    ).train()
    sums = [
        sum_losses(model, Batches([split], vocabulary, 32, size).evaluation())
        for size in (1, 2, 100)
    ]
    assert model.training
    assert sums[0][0] == pytest.approx(sums[1][0], rel=1e-6) == pytest.approx(sums[2][0], rel=1e-6)
    assert {n for _, n in sums} == {split.n_tokens}
    assert sum_losses(model, []) == (0.0, 0) and math.isnan(metrics(0.0, 0).loss)
    half = sum_losses(model, Batches([split], vocabulary, 32, 2).evaluation(), precision="bf16")[0]
    assert half != sums[0][0] and half == pytest.approx(sums[0][0], rel=0.01)


def test_distinct_counts_ngrams_over_all_texts():
    texts = [["a", "b", "a"], ["a", "b"], []]
    assert distinct(texts, 1) == 2 / 5
    assert distinct(texts, 2) == 2 / 3  # ab, ba, ab; none across texts
    assert distinct([], 1) == 0


def test_config_names_files_split_and_model(tmp_path, monkeypatch, capsys, text):
    write(random_gpt2(1, torch.float32), tmp_path / "run" / "model")
    config = tmp_path / "lm.toml"
    config.write_text(
        f'run = "{tmp_path}/run"\n[data]\nvalid = "{tmp_path}/*.txt"\n'
        "[model]\nn_layer = 1\nn_head = 1\nn_embd = 8\nn_ctx = 48\n[train]\nnum_steps = 1\n"
    )
    (tmp_path / "more.txt").write_text("Another file.\n")
    found = run("--config", config, "--split", "valid")
    assert set(found) == {str(text), str(tmp_path / "more.txt")}
    shorter = run("--config", config, "--split", "valid", "model.n_ctx=16")
    assert shorter[str(text)]["loss"] != found[str(text)]["loss"]
    monkeypatch.setattr(sys, "argv", ["evaluate", "--config", str(config), "--split", "valid"])
    evaluate.main()
    assert "more.txt: loss " in capsys.readouterr().out


def test_figures_of_a_run_are_recorded_until_model_or_text_change(tmp_path, monkeypatch, text):
    model = tmp_path / "run" / "model"
    write(random_gpt2(1, torch.float32), model)
    config = tmp_path / "lm.toml"
    config.write_text(
        f'run = "{tmp_path}/run"\n[data]\ntest = "{text}"\n'
        "[model]\nn_layer = 1\nn_head = 1\nn_embd = 8\nn_ctx = 48\n[train]\nnum_steps = 1\n"
    )
    counted = []
    measure = evaluate.measure
    monkeypatch.setattr(
        evaluate, "measure", lambda *arguments: counted.append(1) or measure(*arguments)
    )
    first = run("--config", config)
    assert run("--config", config) == first and len(counted) == 1
    assert (tmp_path / "run/test.txt").read_text().startswith(f"{text}: loss ")
    card = ModelCard.load(model / "README.md")
    assert card.data.library_name == "transformers" and "lm" in card.data.tags
    assert f"    {text}: loss " in card.text and "model.n_ctx = 48" in card.text
    run("--config", config, "model.n_ctx=16")  # leaves the record
    assert run("--config", config) == first and len(counted) == 2
    text.write_text("Another text.\n")
    second = run("--config", config)
    write(random_gpt2(2, torch.float32), model)
    third = run("--config", config)
    assert len(counted) == 4 and first != second != third


def test_printed_figures_have_four_decimals_unless_they_are_whole():
    figures = {"loss": 1.23456, "n_targets": 12345, "distinct_1": 1.0}
    assert evaluate.format_figures(figures) == "loss 1.2346, n targets 12,345, distinct 1 1"


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([], "--config FILE"),
        (["--model", "MODEL"], "--text FILE"),
        (["--model", "MODEL", "--text", "nothing.txt"], "nothing.txt: no such file"),
        (["--model", "MODEL", "--text", "TEXT", "EMPTY"], "found no text"),
        (["--model", "BARE", "--text", "TEXT"], "no [EOS] or <|endoftext|>"),
        (
            ["--config", "CHAT", "--model", "MODEL", "--text", "TEXT"],
            "a model of task lm; wanted chatlm",
        ),
    ],
)
def test_wrong_use_is_one_line(tmp_path, monkeypatch, capsys, text, arguments, reason):
    places = {
        "MODEL": tmp_path / "model",
        "BARE": tmp_path / "bare",
        "TEXT": text,
        "EMPTY": tmp_path / "empty.txt",
        "CHAT": tmp_path / "chat.toml",
    }
    write(random_gpt2(1, torch.float32), places["MODEL"])
    write(random_gpt2(1, torch.float32, vocab_size=257), places["BARE"], byte_tokenizer(("<pad>",)))
    places["EMPTY"].write_text("\n\n")
    size = "n_layer = 1\nn_head = 1\nn_embd = 8\nn_ctx = 8"
    places["CHAT"].write_text(f'task = "chatlm"\n[model]\n{size}\n[train]\nnum_steps = 1\n')
    monkeypatch.setattr(
        sys, "argv", ["evaluate", *(str(places.get(argument, argument)) for argument in arguments)]
    )
    with pytest.raises(SystemExit) as stopped:
        cli(evaluate.main)
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")
    ]  # beside progress
    assert stopped.value.code == 2 and len(lines) == 1 and reason in lines[0]


def test_a_model_that_learns_from_all_turns_is_measured_by_its_own(tmp_path):
    """Of rows of three columns the last is the response, and the first answers nothing."""
    (tmp_path / "rows.tsv").write_text("hi\thello\thow are you\nyes\tno\tmaybe so\n")
    vocabulary = byte_tokenizer()
    vocabulary.save(tmp_path / "tokenizer")
    size = {"n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = GPT2(GPT2Config(vocab_size=vocabulary.vocab_size, **size))
    figures = {}
    for targets in ("response", "responder", "turns", "all"):
        data = DataConfig(
            test=(str(tmp_path / "rows.tsv"),), shards=str(tmp_path / "shards"), targets=targets
        )
        config = Config(task="chatlm", init_from=str(tmp_path / "tokenizer"), data=data)
        shards.write(config)
        split = shards.open_shards(config, "test", vocabulary)
        figures[targets] = loss_figures(model, config, split, vocabulary, "rows")
    assert figures["turns"] == figures["responder"] == figures["response"]
    assert figures["all"]["n_targets"] > figures["response"]["n_targets"]


def test_repetition_is_four_words_in_a_row() -> None:
    assert repeats_itself("a b c d e a b c d".split())
    assert not repeats_itself("a b c d e a b c e".split())
    assert repeats_context("so a b c d".split(), "a b c d e".split())
    assert not repeats_context("so a b c".split(), "a b c d e".split())


def test_only_a_line_feed_ends_a_row_of_answers(tmp_path: Path) -> None:
    answers = tmp_path / "answers.tsv"
    breaks = "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g"  # at which str.splitlines would end a line
    answers.write_text(f"Hi!\t{breaks}\nOne\ttwo\tthree\n", encoding="utf-8")
    assert evaluate.answer_lines(answers) == [
        "you> Hi!",
        f"bot> {breaks}",
        "you> two",
        "bot> three",
    ]

"""The model card: `README.md` of a trained model directory, as hubs show it.

It is written whenever the best model so far is saved, from the run's logs and config, and describes
that model. `gptchat evaluate --config` adds the figures of the run's test files, which stay until
the next model is saved.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gptchat.files import atomic_write
from gptchat.model.gpt2 import GPT2Config, model_on_meta
from gptchat.training.run_log import Entry, RunLog, read_run
from gptchat.training.saved_config import flatten

CARD = "README.md"
EVALUATION = "## Evaluation"
MAX_ROWS = 10  # of the table of evaluations
BARS = "▁▂▃▄▅▆▇█"
LINE_WIDTH = 60  # bars
TASKS = {"lm": "a language model, which continues text", "chatlm": "a chat model, which answers"}
USE = """\
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
"""
CHAT_USE = """
It was trained with token types, and answers best with them: gptchat's own commands pass them, and
its documentation shows how to with transformers. The chat template leaves them out.
"""


def write_card(run: Path, model_config: GPT2Config, samples: Sequence[str]) -> None:
    """Write the card of the run's model, which has just been saved and wrote `samples`.

    Raises UserError where a log cannot be read or the card cannot be written.
    """
    log = read_run(run)
    parts = [header(log), description(log, model_config), figures(log)]
    parts += [quote("## Samples", samples), settings(log), use(log)]
    _write(run / "model" / CARD, "\n".join(parts))


def add_evaluation(model: Path, figures_of: dict[str, dict[str, Any]]) -> None:
    """Add the figures of test files, by file, in place of earlier ones.

    Raises UserError where the card cannot be written. Does nothing where there is none.
    """
    path = model / CARD
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8").partition(f"\n{EVALUATION}\n")[0]
    names = list(dict.fromkeys(name for found in figures_of.values() for name in found))
    rows = []
    for file, found in figures_of.items():
        rows.append([f"`{file}`", *(format_number(found.get(name)) for name in names)])
    header_row = ["file", *(name.replace("_", " ") for name in names)]
    _write(path, f"{text}\n{EVALUATION}\n\n{table(header_row, rows)}\n")


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def header(log: RunLog) -> str:
    """The YAML that hubs read."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += ["- gpt2", "- gptchat"]
    if log.config["task"] == "chatlm":
        lines.append("- conversational")
    return "\n".join([*lines, "---", ""])


def description(log: RunLog, config: GPT2Config) -> str:
    task, start = log.config["task"], log.config["init_from"]
    n_parameters = sum(p.numel() for p in model_on_meta(config).parameters())
    lines = [
        f"# {log.folder.name}",
        "",
        f"GPT-2 as {TASKS[task]}, trained with gptchat.",
        "",
        f"- {n_parameters:,} parameters: {config.n_layer} layers of width {config.n_embd}, "
        f"{config.n_head} heads, {config.n_positions:,} positions, {config.vocab_size:,} entries "
        "in the vocabulary",
        f"- started from {f'`{start}`' if start else 'new weights'}",
    ]
    data = log.config["data"]
    for split in ("train", "valid"):
        source = ", ".join(f"`{name}`" for name in data[split])
        if not source:
            source = f"a share of {data['held_out']:g} of the training documents, drawn by hash"
        lines.append(f"- {split} data: {source}")
    return "\n".join([*lines, ""])


def figures(log: RunLog) -> str:
    """The losses up to this model: a line of bars, and a table of the evaluations."""
    training = [entry["loss"] for entry in log.of_kind("train") if entry["loss"] is not None]
    lines = ["## Training", ""]
    if training:
        bars = sparkline(thin_out(training, LINE_WIDTH))
        lines += [f"    {bars}  training loss, {training[0]:.3f} to {training[-1]:.3f}", ""]
    rows = [figures_row(entry) for entry in thin_out(log.of_kind("valid"), MAX_ROWS)]
    header_row = ["step", "tokens", "held-out loss", "perplexity", "bits per byte"]
    lines += [table(header_row, rows), ""]
    lines.append("The last row is this model's. Losses are nats a token; bits per byte compare")
    lines.append("models with different tokenizers.")
    return "\n".join([*lines, ""])


def figures_row(entry: Entry) -> list[str]:
    keys = ("step", "tokens", "loss", "perplexity", "bits_per_byte")
    return [format_number(entry.get(key)) for key in keys]


def settings(log: RunLog) -> str:
    lines = [f"{key} = {value!r}" for key, value in flatten(log.config).items()]
    return quote("## Config", lines)


def use(log: RunLog) -> str:
    text = f"## Use\n\n{USE}"
    if log.config["task"] == "chatlm":
        text += CHAT_USE
    return text


def quote(title: str, lines: Iterable[str]) -> str:
    """A section whose lines stand as they are, whatever is in them."""
    quoted = []
    for line in lines:
        quoted.append("    " + " ".join(line.split()))
    return "\n".join([title, "", *quoted, ""])


def table(header_row: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header_row, ["---"] * len(header_row), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def format_number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.4f}".removesuffix(".0000")


def thin_out(values: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the values, spread evenly, the last one among them."""
    stride = math.ceil(len(values) / most)
    return list(values[::-1][::stride][::-1]) if values else []


def sparkline(values: Sequence[float]) -> str:
    """A bar for each value, from the lowest to the highest."""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0
    return "".join(BARS[round((value - low) * scale)] for value in values)

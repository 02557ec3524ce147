"""The model card: `README.md` of a trained model directory, as hubs show it.

It is written whenever the best model so far is saved, and describes that model. `gptchat evaluate
--config` adds the figures of the run's test files, which stay until the next model is saved.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptchat.files import atomic_write
from gptchat.training.checkpoint import flatten

CARD = "README.md"
EVALUATION = "\n## Evaluation\n"
TEXT = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, gptchat, {task}]
---
# {name}

GPT-2 with {n_parameters:,} parameters, trained with gptchat as {what}.

## Held-out data

{figures}

A loss is nats a token. Bits per byte compare models with different tokenizers.

## Samples

{samples}

## Use

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)

A chat model answers best with token types, which gptchat's own commands pass.

## Config

{config}
"""


def write_card(
    model_dir: Path,
    config: dict[str, Any],
    n_parameters: int,
    figures: Mapping[str, float],
    samples: Iterable[str],
) -> None:
    """Write the card of a run's model, with its figures and texts that it wrote.

    `config` is the run's resolved config.
    """
    is_chat = config["task"] == "chatlm"
    text = TEXT.format(
        task="conversational" if is_chat else "lm",
        name=model_dir.parent.name,
        what="a chat model, which answers" if is_chat else "a language model, which continues text",
        n_parameters=n_parameters,
        figures=table(list(figures), [list(map(format_number, figures.values()))]),
        samples=quote(samples),
        config=quote(f"{key} = {value!r}" for key, value in flatten(config).items()),
    )
    _write(model_dir / CARD, text)


def add_evaluation(model: Path, figures_of: dict[str, dict[str, Any]]) -> None:
    """Add the figures of test files, by file, in place of earlier ones.

    Raises UserError where the card cannot be written. Does nothing where there is none.
    """
    path = model / CARD
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8").partition(EVALUATION)[0]
    names = list(dict.fromkeys(name for found in figures_of.values() for name in found))
    rows = []
    for file, found in figures_of.items():
        rows.append([f"`{file}`", *(format_number(found.get(name)) for name in names)])
    _write(path, f"{text}{EVALUATION}\n{table(['file', *names], rows)}\n")


def _write(path: Path, text: str) -> None:
    """Write a card. Names of files that are not UTF-8 are written with escapes."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def quote(lines: Iterable[str]) -> str:
    """Lines that are shown as they are, whatever is in them."""
    return "\n".join("    " + " ".join(line.split()) for line in lines)


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    header = [name.replace("_", " ") for name in names]
    lines = [header, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def format_number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4f}".removesuffix(".0000")

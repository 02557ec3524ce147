"""Foreign models: `adapt` appends the special tokens and token types that anyone's GPT-2 lacks.

`gptchat convert` does so to a model directory, so that gptchat can fine-tune and serve it. All
other numbers stay as they are, in float32.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from gptchat.console import CommandParser, UserError
from gptchat.data.tokenizer import Tokenizer
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2, NO_TYPE_ROWS, GPT2Config


@torch.no_grad()
def adapt(model: GPT2, tokenizer: Tokenizer, seed: int) -> dict[str, int]:
    """Append missing special tokens and type rows, in place. Returns them as {name: row}.

    Rows that the model has beyond its vocabulary are used first.
    """
    config = model.config
    first = min(tokenizer.vocab_size, config.vocab_size)  # the first row without a token
    names = tokenizer.add_missing_specials()
    end = tokenizer.vocab_size
    added = dict(zip(names, range(end - len(names), end), strict=True))
    if config.type_rows == NO_TYPE_ROWS:
        added |= {"type 0": end, "type 1": end + 1}
        config = dataclasses.replace(config, type_rows=(end, end + 1))
        end += 2
    if added or end > config.vocab_size:
        config = dataclasses.replace(config, vocab_size=max(config.vocab_size, end))
        _redraw_rows(model, config, first, end, seed)
    return added


def _redraw_rows(model: GPT2, config: GPT2Config, first: int, end: int, seed: int) -> None:
    """Give the model a `config` with more rows, and draw those from `first` up to `end`.

    A new row is the mean of the rows before `first` plus noise of a tenth of their deviation, which
    hardly changes the others' probabilities (Hewitt 2021, "Initializing New Word Embeddings").
    """
    old = model.wte.weight
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(end - first, config.n_embd, generator=generator).to(old)
    known = old[:first]
    wte = old.new_empty(config.vocab_size, config.n_embd)
    wte[: len(old)] = old
    wte[first:end] = known.mean(0) + 0.1 * known.std(0) * noise
    model.wte.weight = model.lm_head.weight = nn.Parameter(wte)
    model.wte.num_embeddings = model.lm_head.out_features = len(wte)
    model.config = config
    model.type_rows = torch.tensor(config.type_rows, device=old.device)


def convert(source: Path, target: Path, task: str | None) -> str:
    """Write the adapted model of `source` to `target`. Returns a line that says what was appended.

    `task` is that of the source if None.
    """
    model, tokenizer, source_task = pretrained.load_model(source)
    added = adapt(model, tokenizer, seed=0)
    task = task or source_task
    pretrained.save_static(
        target, model.config, tokenizer, task, pretrained.answer_defaults(source)
    )
    pretrained.save_weights(target, model)
    rows = ", ".join(f"{name} is row {row}" for name, row in added.items()) or "nothing"
    end = tokenizer.backend.id_to_token(tokenizer.eos_id)
    return (
        f"{target}: written for the task {task}; appended: {rows}; "
        f"a document ends with {end}, row {tokenizer.eos_id}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "convert",
        "Make anyone's GPT-2, a directory in Hugging Face layout, ready for gptchat: add the "
        "special tokens and token types that it lacks.",
        "gptchat convert --from gpt2 --to models/gpt2 --task lm",
    )
    parser.add_argument("--from", dest="source", metavar="DIR", required=True, help="the model")
    parser.add_argument("--to", dest="target", metavar="DIR", required=True, help="a new directory")
    parser.add_argument(
        "--task", choices=pretrained.TASKS, help="default: what the directory says, else lm"
    )
    arguments = parser.parse_args(argv)
    target = Path(arguments.target)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target}: is there already; wanted a new or an empty folder")
    print(convert(Path(arguments.source), target, arguments.task))

"""Configs for a person's own data: `gptchat new NAME --text FILES --chat FILES --minutes 15`.

Writes configs/NAME/lm.toml for text and configs/NAME/chatlm.toml for dialogues, sized to the data,
the machine and the minutes (sizing.py has the rules), and never over a file that is there. Without
text the ChatLM starts from new weights; without dialogues there is only the LM. Some of the
dialogues' first turns go to configs/NAME/prompts.tsv, which `make chatlm` lets the new ChatLM
answer.

What is not sized comes from the default configs, on a GPU from those of gpt2-small. A comment
beside each number says where it is from.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import tomli
import torch

import gptchat.new.sizing as sizing
from gptchat.config import load_config
from gptchat.console import CommandParser, UserError
from gptchat.data.check import Report, verdict
from gptchat.data.dialogue_files import format_row
from gptchat.files import atomic_write, shipped
from gptchat.new.dialogues import choose_prompts, choose_targets, sample
from gptchat.new.sizing import Plan

DEFAULTS = shipped("configs")
# Keys of the default configs that are chosen anew; all others are taken over.
CHOSEN = {
    "tokenizer": {"dir", "vocab_size", "files"},
    "data": {"train", "valid", "test", "weights", "held_out", "shards", "document", "targets"},
    "model": {"n_layer", "n_head", "n_embd", "n_ctx", "dropout"},
    "train": {"num_steps", "num_epochs", "batch_size", "eval_interval", "patience"},
}
FRESH_EPOCHS = 4  # up to these, repeated text teaches nearly as much as new (Muennighoff 2023)
EVALUATIONS = 5  # in a run; twice as many where it may end early
PATIENCE = 3
Lines = list[str]


class Choice(NamedTuple):
    """A value that was chosen, and the reason, which becomes the comment beside it."""

    value: Any
    reason: str = ""


def section(name: str, values: dict[str, Choice], recipe_file: Path) -> Lines:
    """A section of a config: what was chosen, then the other keys of the default config."""
    table = tomli.loads(recipe_file.read_text(encoding="utf-8")).get(name, {})
    others = {key: Choice(value) for key, value in table.items() if key not in CHOSEN[name]}
    lines = ["", f"[{name}]"]
    for key, (value, reason) in (values | others).items():
        comment = f"  # {reason}" if reason else ""
        lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}{comment}")
    return lines


def tokenizer_values(name: str, files: Sequence[str], plan: Plan) -> dict[str, Choice]:
    reason = f"one for each {sizing.BYTES_PER_ENTRY:,} bytes of text, a power of two"
    return {
        "dir": Choice(f"out/{name}/tokenizer"),
        "vocab_size": Choice(plan.vocab_size, f"{reason}, the default's at most"),
        "files": Choice(list(files)),
    }


def data_values(
    name: str, patterns: Sequence[str], cut: dict[str, Choice], report: Report, plan: Plan
) -> dict[str, Choice]:
    """`cut` is `document` of text or `targets` of dialogues."""
    n_documents = report.documents["train"]
    size = (
        f"{report.n_bytes / 1e6:.1f} MB, {n_documents:,} {report.unit}, about "
        f"{sizing.count_tokens(report, plan.vocab_size):,.0f} tokens"
    )
    held_out = f"for valid, and as much for test: about {plan.held_out * n_documents:,.0f}"
    return {
        "train": Choice(list(patterns), size),
        "held_out": Choice(plan.held_out, f"{held_out} {report.unit}, drawn by a hash of each"),
        **cut,
        "shards": Choice(f"out/{name}/shards/{report.task}"),
    }


def model_values(plan: Plan, has_lm: bool, context: str) -> dict[str, Choice]:
    """`context` is the reason for the context; a ChatLM with an LM has the LM's model."""
    model = plan.model
    values = {"n_ctx": Choice(model.n_ctx, "that of the LM" if has_lm else context)}
    if not has_lm:
        values |= {
            "n_layer": Choice(model.n_layer, "the largest size that sees tokens enough"),
            "n_head": Choice(model.n_head, f"{sizing.HEAD_WIDTH} wide each"),
            "n_embd": Choice(model.n_embd),
        }
    if plan.epochs > FRESH_EPOCHS:
        values["dropout"] = Choice(0.1, f"the data is read {plan.epochs:.1f} times")
    return values


def train_values(plan: Plan) -> dict[str, Choice]:
    is_repeated = plan.epochs > FRESH_EPOCHS
    n_evaluations = (1 + is_repeated) * EVALUATIONS
    minutes = f"about {plan.seconds / 60:.1f} minutes, {plan.epochs:.1f} passes over the data"
    interval = max(1, plan.num_steps // n_evaluations)
    values = {
        "num_steps": Choice(plan.num_steps, f"{minutes} ({sizing.MAX_EPOCHS} at most)"),
        "batch_size": Choice(plan.batch_size, "rows of n_ctx tokens"),
        "eval_interval": Choice(interval, f"the best of {n_evaluations} models is kept"),
    }
    if is_repeated:
        values["patience"] = Choice(PATIENCE, "evaluations without a better loss end the run")
    return values


def head(task: str, name: str, minutes: float, flops: float, has_lm: bool) -> Lines:
    what = "An LM of own text" if task == "lm" else "A ChatLM of own dialogues"
    lines = [
        f"# {what}, made by `gptchat new {name} --minutes {minutes:g}`, when training steps "
        f"made {flops / 1e9:,.1f} GFLOP/s.",
        "# File names are relative to the working directory. configs/README.md explains every key.",
        f'task = "{task}"',
        f'run = "out/{name}/{task}"',
    ]
    return [*lines, f'init_from = "out/{name}/lm/model"'] if has_lm else lines


def plan_configs(
    name: str, text: Sequence[str], chat: Sequence[str], minutes: float
) -> dict[str, str]:
    """What to write: file name -> content. Raises UserError for data missing or too little."""
    folder = DEFAULTS / "gpt2-small" if torch.cuda.is_available() else DEFAULTS
    recipe_files = {task: folder / f"{task}.toml" for task in ("lm", "chatlm")}
    if not text:
        recipe_files["chatlm"] = recipe_files["lm"]  # it starts from new weights, as an LM does
    recipe = load_config(str(recipe_files["lm"]))
    default = recipe.model.n_ctx
    patterns = {task: files for task, files in (("lm", text), ("chatlm", chat)) if files}
    cuts: dict[str, dict[str, Choice]] = {}
    reports: dict[str, Report] = {}
    for task, files in patterns.items():
        if task == "lm":
            reports[task], document = sizing.survey(task, files, default)
            size = reports[task].text_bytes / reports[task].documents["train"]
            cuts[task] = {"document": Choice(document, f"of {size:,.0f} bytes on average")}
        else:
            targets = Choice(*choose_targets(sample(files), has_lm=bool(text)))
            reports[task], _ = sizing.survey(task, files, default, targets.value)
            cuts[task] = {"targets": targets}
        if reports[task].warnings:
            print(verdict(reports[task]), file=sys.stderr)
    flops = sizing.measure(recipe)
    rates = {task: load_config(str(file)).train for task, file in recipe_files.items()}
    recipes = {task: replace(recipe, train=train) for task, train in rates.items()}
    plans = sizing.plan_all(reports, recipes, minutes, flops)
    context = "that of the default config"
    if chat and plans["chatlm"].model.n_ctx != default:
        share = 100 * sizing.cut_share(reports["chatlm"])
        context = f"{share:.0f} % of the dialogues do not fit into {default} tokens"
    contents: dict[str, str] = {}
    for task, plan in plans.items():
        has_lm = task == "chatlm" and bool(text)
        data = data_values(name, patterns[task], cuts[task], reports[task], plan)
        sections = {
            "tokenizer": tokenizer_values(name, [*text, *chat], plan),
            "data": data,
            "model": model_values(plan, has_lm, context),
            "train": train_values(plan),
        }
        if has_lm:
            del sections["tokenizer"]
        lines = head(task, name, minutes, flops, has_lm)
        for title, values in sections.items():
            lines += section(title, values, recipe_files[task])
        contents[f"{task}.toml"] = "\n".join(lines) + "\n"
    return contents


def write(path: Path, content: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def write_prompts(path: Path, chat: Sequence[str]) -> None:
    """Write first turns of the dialogues, unless there are none or the file is there; say so."""
    if path.exists():
        print(f"kept {path}, which is there already")
        return
    prompts = choose_prompts(sample(chat))
    if prompts:
        write(path, "".join(format_row([text]) for text in prompts))
        print(f"wrote {path}: {len(prompts)} first turns, which `make chatlm` answers at the end")


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "new",
        "Write configs for your own text and dialogues into configs/NAME, sized to the data, this\n"
        "machine and the minutes that training may take.",
        "gptchat new bard --text 'mine/*.txt' --chat 'talks/*.tsv' --minutes 15",
    )
    add = parser.add_argument
    add("name", metavar="NAME", help="of the folder in configs/, and in out/")
    add("--text", nargs="+", default=[], metavar="FILES", help="text, globs too, .gz too")
    add("--chat", nargs="+", default=[], metavar="FILES", help="dialogues, TSV or JSONL")
    add("--minutes", type=positive, default=15, help="for all training (default: %(default)s)")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", args.name) or args.name == "serve":
        raise UserError(f"NAME: found {args.name!r}; wanted letters, digits, _ and -")
    if not (args.text or args.chat):
        raise UserError("wanted --text FILES, --chat FILES or both")
    for pattern in (*args.text, *args.chat):
        if pattern != pattern.encode(errors="replace").decode():
            raise UserError(
                f"FILES: found {pattern!r}, which is not UTF-8; wanted a glob pattern for it"
            )
    folder = Path("configs", args.name)
    existing = [path for path in (folder / "lm.toml", folder / "chatlm.toml") if path.exists()]
    if existing:
        raise UserError(f"{existing[0]}: is there already; wanted another NAME, or it removed")
    contents = plan_configs(args.name, args.text, args.chat, args.minutes)
    for file_name, content in contents.items():
        write(folder / file_name, content)
        load_config(str(folder / file_name))
        print(f"wrote {folder / file_name}")
    if args.chat:
        write_prompts(folder / "prompts.tsv", args.chat)
    targets = " ".join(Path(file_name).stem for file_name in contents)
    print("next:")
    for file_name in contents:
        print(f"  gptchat check --config {folder / file_name}")
    print(f"  make tokenizer {targets} CONFIGS={folder}")

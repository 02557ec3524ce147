"""Configs for a person's own data: `gptchat new NAME --text FILES --chat FILES --minutes 15`.

Writes configs/NAME/lm.toml for text, configs/NAME/chatlm.toml for dialogues, and a few first turns
of these as configs/NAME/prompts.tsv, which `make chatlm` lets the new ChatLM answer. sizing.py
chooses the sizes; a comment beside each number gives the reason. All else is taken over from the
default configs, on a GPU from those of gpt2-small. Without text the ChatLM starts from new weights.

Files that are there are never overwritten.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import tomli
import torch

import gptchat.new.sizing as sizing
from gptchat.config import load_config
from gptchat.console import CommandParser, UserError
from gptchat.data.check import Report, verdict
from gptchat.data.dialogue import TextTurn
from gptchat.data.dialogue_files import format_row, read_dialogues
from gptchat.files import atomic_write, matching_files, shipped
from gptchat.new.sizing import Plan

DEFAULTS = shipped("configs")
# Keys of the default configs that are chosen anew or left out; all others are taken over.
CHOSEN = {
    "tokenizer": {"dir", "vocab_size", "files"},
    "data": {"train", "valid", "test", "weights", "held_out", "shards", "document", "targets"},
    "model": {"n_layer", "n_head", "n_embd", "n_ctx", "dropout"},
    "train": {"num_steps", "num_epochs", "batch_size", "eval_interval", "patience"},
}
FRESH_EPOCHS = 4  # up to these, repeated text teaches nearly as much as new (Muennighoff 2023)
EVALUATIONS = 5  # in a run; twice as many if it may end early
PATIENCE = 3
SAMPLE = 1000  # dialogues
SAMPLE_FILES = 10
CONVERSATION = 4  # turns of a row, on average, from which on rows are conversations
REPEATED = 0.2  # share of repeated turns from which on rows show one conversation several times
PROMPTS = 10
SHORT = 80  # characters of a prompt
Dialogue = list[TextTurn]


class Choice(NamedTuple):
    """A value that was chosen, and the reason, which becomes the comment beside it."""

    value: Any
    reason: str = ""


Section = dict[str, Choice]


# --- what dialogues show


def sample(patterns: Sequence[str]) -> list[Dialogue]:
    """The first dialogues of the files: SAMPLE in all, from up to SAMPLE_FILES of them.

    Raises UserError for a line that is no dialogue.
    """
    paths = matching_files(patterns)
    chosen = paths[:: max(1, -(-len(paths) // SAMPLE_FILES))]  # rounded up
    dialogues: list[Dialogue] = []
    for path in chosen:
        dialogues += islice(read_dialogues(path), SAMPLE // len(chosen))
    return dialogues


def choose_targets(dialogues: Sequence[Dialogue], has_lm: bool) -> Choice:
    """[data] targets; `has_lm` says whether the ChatLM starts from an LM.

    Rows that repeat turns show one conversation again and again, such as a program's log of all
    messages so far. Of these only the last turn is learned, so that none is learned twice.
    """
    n_turns = sum(map(len, dialogues)) / max(1, len(dialogues))
    # First turns may repeat: many conversations begin with the same greeting or system message.
    texts = [text for turns in dialogues for _, text in turns[1:]]
    repeated = 1 - len(set(texts)) / max(1, len(texts))
    figures = f"rows have {n_turns:.1f} turns, {100 * repeated:.0f} % repeat others"
    if has_lm:
        return Choice("response" if repeated >= REPEATED else "responder", figures)
    if repeated < REPEATED and n_turns >= CONVERSATION:
        return Choice("turns", f'{figures}. "all": the first, too, but long rows are cut')
    return Choice("all", "without an LM before it, it learns from every token")


def opening(turns: Dialogue) -> str:
    """What the responder answers first; empty if the responder speaks first."""
    text = ""
    for speaker, spoken in turns:
        if speaker == 1:
            break
        text = spoken
    return text


def choose_prompts(dialogues: Sequence[Dialogue]) -> list[str]:
    """Up to PROMPTS distinct short openings, spread over the dialogues."""
    openings = dict.fromkeys(map(opening, dialogues))
    short = [text for text in openings if 0 < len(text) <= SHORT]
    n = min(PROMPTS, len(short))
    return [short[i * len(short) // n] for i in range(n)]


# --- the text of a config


def tokenizer_section(name: str, files: Sequence[str], plan: Plan) -> Section:
    reason = f"one for each {sizing.BYTES_PER_ENTRY:,} bytes of text, a power of two"
    return {
        "dir": Choice(f"out/{name}/tokenizer"),
        "vocab_size": Choice(plan.vocab_size, f"{reason}, the default's at most"),
        "files": Choice(list(files)),
    }


def data_section(
    name: str, patterns: Sequence[str], cut: Section, report: Report, plan: Plan
) -> Section:
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


def model_section(plan: Plan, has_lm: bool) -> Section:
    """A ChatLM with an LM has the LM's size, which is not repeated."""
    model = plan.model
    values = {"n_ctx": Choice(model.n_ctx, "that of the LM")}
    if not has_lm:
        values = {
            "n_ctx": Choice(model.n_ctx, "the default's; more for longer dialogues"),
            "n_layer": Choice(model.n_layer, "the largest size that sees tokens enough"),
            "n_head": Choice(model.n_head, f"{sizing.HEAD_WIDTH} wide each"),
            "n_embd": Choice(model.n_embd),
        }
    if plan.epochs > FRESH_EPOCHS:
        values["dropout"] = Choice(0.1, f"the data is read {plan.epochs:.1f} times")
    return values


def train_section(plan: Plan) -> Section:
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


def config_text(intro: str, sections: Mapping[str, Section], recipe_file: Path) -> str:
    """TOML: `intro`, then in each section what was chosen and the recipe's other keys."""
    recipe = tomli.loads(recipe_file.read_text(encoding="utf-8"))
    text = intro
    for name, chosen in sections.items():
        text += f"\n[{name}]\n"
        values = recipe.get(name, {})
        others = {key: Choice(values[key]) for key in values if key not in CHOSEN[name]}
        for key, (value, reason) in (chosen | others).items():
            comment = f"  # {reason}" if reason else ""
            text += f"{key} = {json.dumps(value, ensure_ascii=False)}{comment}\n"
    return text


def plan_files(
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
    cuts: dict[str, Section] = {}
    reports: dict[str, Report] = {}
    prompts: list[str] = []
    if text:
        reports["lm"], document = sizing.survey("lm", text, default)
        size = reports["lm"].text_bytes / reports["lm"].documents["train"]
        cuts["lm"] = {"document": Choice(document, f"of {size:,.0f} bytes on average")}
    if chat:
        dialogues = sample(chat)
        prompts = choose_prompts(dialogues)
        targets = choose_targets(dialogues, has_lm=bool(text))
        reports["chatlm"], _ = sizing.survey("chatlm", chat, default, targets.value)
        cuts["chatlm"] = {"targets": targets}
    for report in reports.values():
        if report.warnings:
            print(verdict(report), file=sys.stderr)
    flops = sizing.measure(recipe)
    train = {task: load_config(str(file)).train for task, file in recipe_files.items()}
    plans = sizing.plan_all(reports, recipe, train, minutes, flops)
    contents: dict[str, str] = {}
    for task, plan in plans.items():
        has_lm = task == "chatlm" and bool(text)
        sections = {
            "tokenizer": tokenizer_section(name, [*text, *chat], plan),
            "data": data_section(name, patterns[task], cuts[task], reports[task], plan),
            "model": model_section(plan, has_lm),
            "train": train_section(plan),
        }
        intro = (
            f"# {'An LM' if task == 'lm' else 'A ChatLM'} of own data, made by `gptchat new {name} "
            f"--minutes {minutes:g}`, when training steps made {flops / 1e9:,.1f} GFLOP/s.\n"
            "# File names are relative to the working directory. configs/README.md explains every "
            f'key.\ntask = "{task}"\nrun = "out/{name}/{task}"\n'
        )
        if has_lm:
            del sections["tokenizer"]
            intro += f'init_from = "out/{name}/lm/model"\n'
        contents[f"{task}.toml"] = config_text(intro, sections, recipe_files[task])
    if prompts:
        contents["prompts.tsv"] = "".join(format_row([text]) for text in prompts)
    return contents


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
    for file_name in ("lm.toml", "chatlm.toml", "prompts.tsv"):
        if (folder / file_name).exists():
            raise UserError(
                f"{folder / file_name}: is there already; wanted another NAME, or it removed"
            )
    contents = plan_files(args.name, args.text, args.chat, args.minutes)
    for file_name, content in contents.items():
        with atomic_write(folder / file_name) as temporary:
            temporary.write_text(content, encoding="utf-8")
        print(f"wrote {folder / file_name}")
    tasks = [Path(file_name).stem for file_name in contents if file_name != "prompts.tsv"]
    print("next:")
    for task in tasks:
        print(f"  gptchat check --config {folder}/{task}.toml")
    print(f"  make tokenizer {' '.join(tasks)} CONFIGS={folder}")

"""Configs for a person's own data: `gptchat new NAME --text FILES --chat FILES --minutes 15`.

Writes configs/NAME/lm.toml for text and configs/NAME/chatlm.toml for dialogues, sized to the data,
the machine and the minutes (sizing.py has the rules, dialogues.py those of what is learned of
dialogues), and never over a file that is there. Without text the ChatLM starts from new weights;
without dialogues there is the LM alone. Some of the dialogues' first turns go to
configs/NAME/prompts.tsv, which `make chatlm` lets the new ChatLM answer.

What is not sized comes from the default configs, on a GPU from those of gpt2-small. A comment
beside each number says where it is from.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli
import torch

import gptchat.new.sizing as sizing
from gptchat.config import Config, load_config
from gptchat.console import CommandParser, UserError
from gptchat.data.check import Report, verdict
from gptchat.data.dialogue_files import format_row
from gptchat.files import atomic_write, shipped
from gptchat.new.dialogues import Targets, choose_prompts, choose_targets, sample
from gptchat.new.sizing import Plan, Speed

DEFAULTS = shipped("configs")
# Keys of the default configs that are chosen anew; all others are taken over.
CHOSEN = {
    "tokenizer": {"dir", "vocab_size", "files"},
    "data": {"train", "valid", "test", "weights", "held_out", "shards", "document", "targets"},
    "model": {"n_layer", "n_head", "n_embd", "n_ctx", "dropout"},
    "train": {"num_steps", "num_epochs", "batch_size", "eval_interval", "patience"},
}
EVALUATIONS = 5  # in a run, where the text is not read so often that it should end early
PATIENCE = 3
HELD_OUT_FILES = 3  # for valid, on average: each is drawn by a hash, and one is needed at least
Lines = list[str]


def toml(values: dict[str, Any]) -> Lines:
    """Lines of TOML for plain values, strings and lists of them."""
    return [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def taken_over(recipe_file: Path, section: str) -> Lines:
    """The keys of a default config's section that are not chosen anew."""
    table = tomli.loads(recipe_file.read_text(encoding="utf-8")).get(section, {})
    return toml({key: value for key, value in table.items() if key not in CHOSEN[section]})


def tokenizer_lines(name: str, files: Sequence[str], plan: Plan, recipe_file: Path) -> Lines:
    return [
        "",
        "[tokenizer]",
        f'dir = "out/{name}/tokenizer"',
        f"vocab_size = {plan.vocab_size}  # an entry for each {sizing.BYTES_PER_ENTRY:,} bytes of "
        "text, a power of two, the default's at most",
        *toml({"files": list(files)}),
        *taken_over(recipe_file, "tokenizer"),
    ]


def data_lines(
    name: str, patterns: Sequence[str], choice: str, report: Report, plan: Plan, recipe_file: Path
) -> Lines:
    """`choice` is the line of `document` or `targets`."""
    n_documents = report.documents["train"]
    lines = [
        "",
        "[data]",
        f"# {report.n_bytes / 1e6:.1f} MB, {n_documents:,} {report.unit}, about "
        f"{sizing.count_tokens(report, plan.vocab_size):,.0f} tokens",
        *toml({"train": list(patterns)}),
        f"held_out = {plan.held_out:g}  # for valid, and as much for test: about "
        f"{plan.held_out * n_documents:,.0f} {report.unit}, drawn by a hash of each",
    ]
    lines += [choice, *toml({"shards": f"out/{name}/shards/{report.task}"})]
    return lines + taken_over(recipe_file, "data")


def document_line(document: str, report: Report, plan: Plan) -> str:
    """How text is cut into documents, and the other way where files enough would be held out."""
    reason = "blank lines divide documents"
    if document == "line":
        reason = "the text has hardly a blank line"
    size = report.n_characters / report.documents["train"]
    line = f'document = "{document}"  # {reason}, {size:,.0f} characters each on average'
    if plan.held_out * report.n_files < HELD_OUT_FILES:
        return line
    return f'{line}; "file": each file is one'


def targets_line(targets: Targets) -> str:
    """What a ChatLM learns of own dialogues."""
    return f'targets = "{targets.value}"  # {targets.reason}'


def context_line(plan: Plan, reports: dict[str, Report], recipe: Config, has_lm: bool) -> str:
    """The context; where it is not the default's, the dialogues are why.

    A ChatLM would have its LM's without this line, but `gptchat check` could not know that before
    the LM is trained.
    """
    line = f"n_ctx = {plan.n_ctx}"
    if has_lm:
        return f"{line}  # that of the LM"
    if plan.n_ctx == recipe.model.n_ctx:
        return line
    percent = f"{100 * sizing.cut_share(reports['chatlm']):.0f} %"
    return f"{line}  # {percent} of the dialogues do not fit into {recipe.model.n_ctx} tokens"


def model_lines(plan: Plan, recipe_file: Path, has_sizes: bool, context: str) -> Lines:
    n_layer, n_embd = plan.size
    lines = ["", "[model]"]
    if has_sizes:
        lines += [
            "# The largest size that is trained on enough tokens for each parameter.",
            f"n_layer = {n_layer}",
            f"n_head = {max(1, n_embd // sizing.HEAD_WIDTH)}  # {sizing.HEAD_WIDTH} wide each",
            f"n_embd = {n_embd}",
        ]
    lines.append(context)
    if plan.epochs > sizing.FRESH_EPOCHS:
        lines.append(f"dropout = 0.1  # the data is read {plan.epochs:.1f} times")
    return lines + taken_over(recipe_file, "model")


def train_lines(plan: Plan, recipe_file: Path) -> Lines:
    lines = [
        "",
        "[train]",
        f"num_steps = {plan.num_steps}  # about {plan.seconds / 60:.1f} minutes, {plan.epochs:.1f} "
        f"passes over the data ({sizing.MAX_EPOCHS} at most)",
        f"batch_size = {plan.batch_size}  # rows of n_ctx tokens",
    ]
    if plan.epochs > sizing.FRESH_EPOCHS:
        interval = max(1, plan.num_steps // (2 * EVALUATIONS))
        lines.append(f"eval_interval = {interval}  # the best of {2 * EVALUATIONS} models is kept")
        lines.append(f"patience = {PATIENCE}  # so often no better: it is learned by heart")
    else:
        interval = max(1, plan.num_steps // EVALUATIONS)
        lines.append(f"eval_interval = {interval}  # the best of {EVALUATIONS} models is kept")
    return lines + taken_over(recipe_file, "train")


def head_lines(task: str, name: str, minutes: float, speed: Speed, start: str) -> Lines:
    what = "An LM of own text" if task == "lm" else "A ChatLM of own dialogues"
    lines = [
        f"# {what}, made by `gptchat new {name} --minutes {minutes:g}`, when training steps on the "
        f"{speed.device.replace('cuda', 'GPU').replace('cpu', 'CPU')}",
        f"# made {speed.flops / 1e9:,.1f} GFLOP/s. File names are relative to the working "
        "directory. configs/README.md",
        "# explains every key, gptchat/new/ the choices.",
        f'task = "{task}"',
        f'run = "out/{name}/{task}"',
    ]
    return [*lines, f'init_from = "{start}"'] if start else lines


def survey(
    text: Sequence[str], chat: Sequence[str], targets: Targets, recipe: Config
) -> tuple[dict[str, Report], str]:
    """(task -> what its files hold, how text is cut into documents).

    A note on stderr tells what `gptchat check` would warn of.
    """
    reports: dict[str, Report] = {}
    document = "block"
    if text:
        reports["lm"], document = sizing.survey("lm", text, recipe.model.n_ctx)
    if chat:
        reports["chatlm"], _ = sizing.survey("chatlm", chat, recipe.model.n_ctx, targets.value)
    for report in reports.values():
        if report.warnings:
            print(verdict(report), file=sys.stderr)
    return reports, document


def plan_configs(
    name: str, text: Sequence[str], chat: Sequence[str], minutes: float
) -> dict[str, str]:
    """What to write: file name -> content. Raises UserError for data missing or too little."""
    folder = DEFAULTS / "gpt2-small" if torch.cuda.is_available() else DEFAULTS
    recipe_files = {task: folder / f"{task}.toml" for task in ("lm", "chatlm")}
    if not text:
        recipe_files["chatlm"] = recipe_files["lm"]  # it starts from new weights, as an LM does
    recipe = load_config(str(recipe_files["lm"]))
    targets = choose_targets(chat, has_lm=bool(text))
    reports, document = survey(text, chat, targets, recipe)
    speed = sizing.measure(recipe)
    plans = make_plans(reports, minutes, speed, recipe, recipe_files)
    patterns = {"lm": text, "chatlm": chat}
    contents: dict[str, str] = {}
    for task, plan in plans.items():
        recipe_file = recipe_files[task]
        is_first = task == "lm" or not text
        lines = head_lines(task, name, minutes, speed, "" if is_first else f"out/{name}/lm/model")
        if is_first:
            lines += tokenizer_lines(name, [*text, *chat], plan, recipe_files["lm"])
        report = reports[task]
        choice = document_line(document, report, plan) if task == "lm" else targets_line(targets)
        lines += data_lines(name, patterns[task], choice, report, plan, recipe_file)
        context = context_line(plan, reports, recipe, not is_first)
        lines += model_lines(plan, recipe_file, is_first, context)
        lines += train_lines(plan, recipe_file)
        contents[f"{task}.toml"] = "\n".join(lines) + "\n"
    return contents


def make_plans(
    reports: dict[str, Report],
    minutes: float,
    speed: Speed,
    recipe: Config,
    recipe_files: dict[str, Path],
) -> dict[str, Plan]:
    """The plan of each task: the LM's first, whose size the ChatLM has."""
    n_bytes = sum(map(sizing.text_bytes, reports.values()))
    vocab_size = sizing.choose_vocabulary(n_bytes, recipe)
    n_ctx = recipe.model.n_ctx
    if "chatlm" in reports:
        n_ctx = sizing.choose_context(reports["chatlm"], recipe)

    def plan(task: str, seconds: float, size: tuple[int, int] | None = None) -> Plan:
        train = load_config(str(recipe_files[task])).train
        own_recipe = replace(recipe, train=train)
        return sizing.make_plan(reports[task], seconds, speed, own_recipe, vocab_size, n_ctx, size)

    seconds = 60 * minutes * sizing.STEPS_SHARE
    if len(reports) == 1:
        return {task: plan(task, seconds) for task in reports}
    return sizing.divide(seconds, plan)


def write(path: Path, content: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def write_prompts(path: Path, chat: Sequence[str]) -> None:
    """Write first turns of the dialogues, unless there are none or the file is there; say so."""
    if path.exists():
        print(f"kept {path}, which is there already")
        return
    prompts = choose_prompts(sample(chat))
    if not prompts:
        return
    write(path, "".join(format_row([text]) for text in prompts))
    what = "a first turn" if len(prompts) == 1 else f"{len(prompts)} first turns"
    print(f"wrote {path}: {what} of your dialogues, which `make chatlm` answers at the end")


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

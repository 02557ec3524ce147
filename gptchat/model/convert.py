"""`gptchat convert`: anyone's GPT-2 as a model directory that gptchat can fine-tune and serve.

Special tokens and token types that it lacks are appended; every other number stays as it is, in
float32.
"""

from collections.abc import Sequence
from pathlib import Path

from gptchat.console import CommandParser, UserError
from gptchat.model.pretrained import (
    TASKS,
    adapt,
    answer_defaults,
    load_model,
    save_static,
    save_weights,
)


def convert(source: Path, target: Path, task: str | None) -> str:
    """Read `source`, adapt it and write `target`, for the task that the source names if None.

    Returns a line that says what was appended.
    """
    model, tokenizer, source_task = load_model(source)
    added = adapt(model, tokenizer, seed=0)
    task = task or source_task
    save_static(target, model.config, tokenizer, task, answer_defaults(source))
    save_weights(target, model)
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
    parser.add_argument("--task", choices=TASKS, help="default: what the directory says, else lm")
    arguments = parser.parse_args(argv)
    target = Path(arguments.target)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target}: is there already; wanted a new or an empty folder")
    print(convert(Path(arguments.source), target, arguments.task))

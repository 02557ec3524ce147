"""`gptchat COMMAND`, or `python -m gptchat COMMAND`: every command by its name. Starts without torch."""

import importlib
import sys

from gptchat.console import UserError, cli

COMMANDS = {  # name: (module whose `main(arguments)` runs it, what it does)
    "corpora": ("gptchat.data.corpora", "write the default corpora to data/ as plain text and TSV"),
    "tokenizer": ("gptchat.data.tokenizer", "train a tokenizer on a config's text"),
    "shards": ("gptchat.data.shards", "encode a config's data into token ids on disk"),
    "train": ("gptchat.train", "train an LM or a ChatLM, or go on where a run was stopped"),
    "evaluate": ("gptchat.evaluate", "measure loss, perplexity and bits per byte on held-out text"),
    "convert": (
        "gptchat.model.pretrained",
        "make any Hugging Face GPT-2 directory ready for gptchat",
    ),
    "chat": ("gptchat.chat", "talk to a model in the terminal, or answer a file of dialogues"),
    "serve": ("gptchat.serve", "serve models over HTTP with TorchServe"),
    "bench": ("gptchat.bench.__main__", "measure speed beside transformers, in one run"),
}


def usage() -> str:
    lines = [f"  {name:10} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: gptchat COMMAND [ARGUMENTS]",
            "",
            *lines,
            "",
            "`gptchat COMMAND --help` says more, with an example.",
        ]
    )


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command; wanted one of {', '.join(COMMANDS)}")
    module, _ = COMMANDS[name]
    importlib.import_module(module).main(arguments)


def run() -> None:
    """The console script `gptchat`."""
    cli(main)


if __name__ == "__main__":
    run()

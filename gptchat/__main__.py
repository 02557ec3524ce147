"""The command line: `gptchat COMMAND [ARGUMENTS]`, or `python -m gptchat COMMAND [ARGUMENTS]`.

Only the module of the given command is imported, so `gptchat --help` starts without torch.
"""

import importlib
import sys

from gptchat.console import UserError, cli

COMMANDS = {  # name: (module with `main(argv)`, summary)
    "corpora": ("gptchat.data.corpora", "write the default corpora to data/ as plain text and TSV"),
    "new": ("gptchat.new", "write configs for your own data, sized to it and to this machine"),
    "tokenizer": ("gptchat.data.tokenizer", "train a tokenizer on a config's text"),
    "check": ("gptchat.data.check", "look through a config's data before training"),
    "shards": ("gptchat.data.shards", "encode a config's data into token ids on disk"),
    "train": ("gptchat.train", "train an LM or a ChatLM, or resume a run that was stopped"),
    "evaluate": ("gptchat.evaluate", "measure loss, perplexity and bits per byte on held-out text"),
    "convert": ("gptchat.model.convert", "adapt a Hugging Face GPT-2 directory to gptchat"),
    "chat": ("gptchat.chat", "talk to a model in the terminal, or answer a file of dialogues"),
    "serve": ("gptchat.serve", "serve models over HTTP with TorchServe"),
    "bench": ("gptchat.bench.__main__", "measure speed side by side with the alternatives"),
}


def usage() -> str:
    lines = ["usage: gptchat COMMAND [ARGUMENTS]", ""]
    lines += [f"  {name:10} {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += ["", "`gptchat COMMAND --help` describes a command and its options, with an example."]
    return "\n".join(lines)


def dispatch() -> None:
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        return
    if command not in COMMANDS:
        raise UserError(f"{command}: no such command; wanted one of {', '.join(COMMANDS)}")
    module, _ = COMMANDS[command]
    importlib.import_module(module).main(arguments)


def main() -> None:
    cli(dispatch)


if __name__ == "__main__":
    main()

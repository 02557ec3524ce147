"""`gptchat bench BENCHMARK`: gptchat and its alternatives, side by side in one run.

A benchmark is a module with `add_options(parser)` and `run(args, report)`.
"""

from collections.abc import Sequence

import torch

from gptchat.bench import Report, decode, positive, serving, training
from gptchat.console import CommandParser, cli

BENCHMARKS = {  # name: (module, summary, example arguments)
    "decode": (decode, "generate text, beside transformers' generate", "--model out/chatlm/model"),
    "train": (training, "an optimizer step, beside transformers' GPT2LMHeadModel", "--rows 16"),
    "serve": (
        serving,
        "a running server, beside its engine alone and transformers behind a lock",
        "--model out/chatlm/model --clients 1 32",
    ),
}


def command_line() -> CommandParser:
    parser = CommandParser(
        "bench",
        "Measure the speed of gptchat and of its alternatives, in turn, in one run.",
        "gptchat bench decode --batches 1 8",
    )
    subparsers = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, (module, summary, example) in BENCHMARKS.items():
        subparser = subparsers.add_parser(
            name,
            command=f"bench {name}",
            help=summary,
            description=f"Measure: {summary}.",
            example=f"gptchat bench {name} {example}",
        )
        module.add_options(subparser)
        add = subparser.add_argument
        threads = torch.get_num_threads()
        add("--rounds", type=positive, default=3, help="turns of each contestant (%(default)s)")
        add("--threads", type=positive, default=threads, help="torch's threads (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = command_line().parse_args(argv)
    torch.set_num_threads(args.threads)
    report = Report()
    BENCHMARKS[args.benchmark][0].run(args, report)
    report.show()


if __name__ == "__main__":
    cli(main)

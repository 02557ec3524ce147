"""`gptchat bench train`: one optimizer step of AdamW, beside transformers' GPT2LMHeadModel.

All contestants start from the same weights and train on the same ids. Each has its own process,
since the allocator's settings and the peak memory belong to a process; while one makes a step, the
others wait. "As found" is without `runtime.tune_memory`.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from gptchat.bench import Report, check_context, positive, timed
from gptchat.bench.decode import Transformers
from gptchat.config import TrainConfig, load_config
from gptchat.console import UserError
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.runtime import default_device, tune_memory
from gptchat.training.distributed import World, wrap_model
from gptchat.training.metrics import PRECISIONS, autocast, resolve_precision
from gptchat.training.monitor import matmul_peak, peak_memory, step_flops
from gptchat.training.optim import clip_gradients, make_optimizers

CONTESTANTS = ("transformers as found", "transformers", "gptchat eager", "gptchat compiled")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", metavar="FILE", help="take the model's size from here (default: GPT-2 124M)")
    add("--rows", type=positive, default=4, help="rows of a step (%(default)s)")
    add("--row", type=positive, default=256, help="tokens of a row (%(default)s)")
    precision_help = "default: bf16 if the device multiplies that, else fp32"
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), help=precision_help)


def train_config(args: argparse.Namespace) -> GPT2Config:
    """GPT-2 124M, or the size in --config, without dropout."""
    if not args.config:
        return GPT2Config(embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)
    config = load_config(args.config)
    return GPT2Config.of(replace(config.model, dropout=0), config.tokenizer.vocab_size)


def training_step(contestant: str, args: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one optimizer step of AdamW on random ids."""
    torch.manual_seed(0)
    config = train_config(args)
    device = default_device()
    model = GPT2(config).to(device).train()
    settings = TrainConfig(compile="compiled" in contestant)
    ids = torch.randint(config.vocab_size, (args.rows, args.row + 1)).to(device)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    ours = "gptchat" in contestant
    if ours:
        trained = wrap_model(model, settings, World(device))
        labels = {"targets": targets.flatten()}
    else:
        trained = Transformers(model).model.train()
        labels = {"labels": inputs}  # transformers itself shifts them by one
    optimizer = make_optimizers(trained, settings)  # type: ignore[arg-type]

    def step() -> None:
        with autocast(device, args.precision):
            output = trained(input_ids=inputs, **labels)
        if ours:
            loss = output / targets.numel()  # ours is a sum over targets
        else:
            loss = output.loss
        loss.backward()
        clip_gradients(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def worker(pipe: Connection, contestant: str, args: argparse.Namespace) -> None:
    """A contestant's process. For each True from the pipe it makes a step and sends its seconds.

    After a False it sends its peak memory in bytes and ends.
    """
    torch.set_num_threads(args.threads)
    step = training_step(contestant, args)
    if "as found" not in contestant:
        tune_memory()
    while pipe.recv():
        pipe.send(timed(step))
    pipe.send(peak_memory(torch.device(default_device())))


def exchange(contestant: str, pipe: Connection, goes_on: bool) -> Any:
    """Ask a contestant's process for a step, or for its end. Raises UserError if it is gone."""
    try:
        pipe.send(goes_on)
        return pipe.recv()
    except (EOFError, OSError):
        raise UserError(f"{contestant}: its process has ended; the reason is above") from None


def run(args: argparse.Namespace, report: Report) -> None:
    check_context(args.row, "--row", train_config(args).n_positions)
    args.precision = resolve_precision(args.precision, default_device())
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for contestant in CONTESTANTS:
        pipes[contestant], worker_end = context.Pipe()
        process = context.Process(target=worker, args=(worker_end, contestant, args), daemon=True)
        process.start()
        worker_end.close()  # so that reading ends when the process does
    n_tokens = args.rows * args.row
    medians = report.race(
        f"train, {args.rows} x {args.row}, {args.precision}",
        "tokens/s",
        {name: partial(exchange, name, pipe, True) for name, pipe in pipes.items()},
        args.rounds,
        n_tokens,
    )
    peak = matmul_peak(torch.device(default_device()), PRECISIONS[args.precision])
    flops = step_flops(train_config(args), n_tokens, n_tokens, args.row)
    for contestant, pipe in pipes.items():
        peak_bytes = exchange(contestant, pipe, False)
        share = flops / medians[contestant] / peak
        memory_gb = round(peak_bytes / 1e9, 2)
        report.note(contestant, of_peak=f"{share:.0%}", peak_memory_gb=memory_gb)

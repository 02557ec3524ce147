"""gptchat beside what you would use instead: in one run, taking turns, on the same weights or text.

    gptchat bench decode       beside transformers' generate: tokens/s at several batch sizes, first token
    gptchat bench train        beside transformers' GPT2LMHeadModel: one optimizer step
    gptchat bench tokenizer    encoding into shards, beside `tokenizers` alone
    gptchat bench serve        a running server, its engine alone, transformers' generate behind a lock

A round of each contestant warms up; then come medians, with the quartiles, and the ratio to the first contestant, above
1 where faster. Without --model the weights are GPT-2's 124M, random and seeded.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection

import torch

from gptchat.bench.decode import Transformers
from gptchat.bench.report import Report, timed
from gptchat.config import TrainConfig, load_config
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.runtime import tune_memory
from gptchat.training.distributed import World, wrap_model
from gptchat.training.monitor import matmul_peak, peak_memory, step_flops
from gptchat.training.optim import clip_gradients, make_optimizers


def train_config(args: argparse.Namespace) -> GPT2Config:
    """GPT-2 124M, or the size in --config, without dropout."""
    config = GPT2Config(embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)
    if not args.config:
        return config
    size = (found := load_config(args.config)).model
    return replace(
        config,
        vocab_size=found.tokenizer.vocab_size,
        n_layer=size.n_layer,
        n_head=size.n_head,
        n_embd=size.n_embd,
        n_positions=size.n_ctx,
    )


def training_step(who: str, args: argparse.Namespace) -> Callable[[], None]:
    """One optimizer step of AdamW on random ids."""
    torch.manual_seed(0)
    model, settings = GPT2(train_config(args)).train(), TrainConfig(compile="compiled" in who)
    ours, ids = "gptchat" in who, torch.randint(model.config.vocab_size, (args.rows, args.row + 1))
    trained = (
        wrap_model(model, settings, World("cpu")) if ours else Transformers(model).model.train()
    )
    optimizer = make_optimizers(trained, settings)[0]  # type: ignore[arg-type]
    how = {"targets": ids[:, 1:].flatten()} if ours else {"labels": ids[:, :-1]}

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if args.precision == "bf16" else nullcontext():
            loss = trained(input_ids=ids[:, :-1], **how)
        (loss / ids[:, 1:].numel() if ours else loss.loss).backward()
        clip_gradients(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def worker(pipe: Connection, who: str, args: argparse.Namespace) -> None:
    """A process for one contestant: waits for its turn, tells the seconds of one step; at the end its peak memory."""
    torch.set_num_threads(args.threads)
    step = training_step(who, args)
    if "as found" not in who:
        tune_memory()
    while pipe.recv():
        pipe.send(timed(step))
    pipe.send(peak_memory(torch.device("cpu")))


def turn(pipe: Connection) -> list[float]:
    pipe.send(True)
    return pipe.recv()


def bench_training(args: argparse.Namespace, report: Report) -> None:
    """Each contestant in its own process: the allocator's settings and the peak memory are a process's."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for who in ("transformers as found", "transformers", "gptchat eager", "gptchat compiled"):
        pipes[who], end = context.Pipe()
        context.Process(target=worker, args=(end, who, args), daemon=True).start()
    tokens = args.rows * args.row
    medians = report.race(
        f"train, {args.rows} x {args.row}",
        "tokens/s",
        {who: partial(turn, pipe) for who, pipe in pipes.items()},
        args.rounds,
        tokens,
    )
    peak = matmul_peak(
        torch.device("cpu"), torch.bfloat16 if args.precision == "bf16" else torch.float32
    )
    for who, pipe in pipes.items():
        pipe.send(False)
        share = step_flops(train_config(args), tokens, tokens, args.row) / medians[who] / peak
        report.note(who, of_matmul_peak=f"{share:.0%}", peak_memory_gb=round(pipe.recv() / 1e9, 2))

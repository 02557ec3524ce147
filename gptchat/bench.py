"""gptchat beside what you would use instead: in one run, taking turns, on the same weights or text.

    python -m gptchat.bench decode       beside transformers' generate: tokens/s at several batch sizes, first token
    python -m gptchat.bench train        beside transformers' GPT2LMHeadModel: one optimizer step
    python -m gptchat.bench tokenizer    encoding into shards, beside `tokenizers` alone
    python -m gptchat.bench serve        a running server, its engine alone, transformers' generate behind a lock

A round of each contestant warms up; then come medians, with the quartiles, and the ratio to the first contestant, above
1 where faster. Without --model the weights are GPT-2's 124M, random and seeded.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptchat import pretrained
from gptchat.config import TrainConfig, UserError, cli, expand, load
from gptchat.engine import Engine, Request, generate
from gptchat.linear import DTYPES
from gptchat.model import GPT2, GPT2Config
from gptchat.optim import clip_gradients, make_optimizers
from gptchat.runlog import matmul_peak, peak_memory, step_flops
from gptchat.sampling import Sampling
from gptchat.tokenizer import Tokenizer, for_config
from gptchat.train import prepare
from gptchat.world import World, settle

SIZE = {"float32": 4, "bfloat16": 2, "int8": 1}


class Report:
    """Lines of a table, or of JSON: what was measured, of whom, its median and quartiles, the ratio to the first."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def race(self, what: str, unit: str, contestants: dict[str, Callable[[], Sequence[float]]], rounds: int,
             amount: float = 1) -> dict[str, float]:
        """Let the contestants, each of which returns seconds, take turns. Returns their medians in seconds; the table
        has ms or, in any other unit, `amount` / seconds."""
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(rounds + 1):
            for name, run in contestants.items():
                measured = run()
                seconds[name] += measured if number else []
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        first = next(iter(medians.values()))
        for name, values in seconds.items():
            figures = sorted(value * 1e3 if unit == "ms" else amount / value for value in values)
            low, middle, high = (figures[round(share * (len(figures) - 1))] for share in (0.25, 0.5, 0.75))
            self.lines.append({"what": what, "who": name, "median": middle, "low": low, "high": high, "unit": unit,
                               "ratio": first / medians[name], "notes": {}})
        return medians

    def note(self, who: str, **notes: Any) -> None:
        """Add to the latest line of that contestant."""
        next(line for line in reversed(self.lines) if line["who"] == who)["notes"] |= notes

    def show(self, as_json: bool) -> None:
        if as_json:
            return print(json.dumps({"machine": machine(), "lines": self.lines}, indent=1))
        print(", ".join(f"{key} {value}" for key, value in machine().items()))
        for line in self.lines:
            notes = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in line["notes"].items())
            print("{what:22} {who:22} {median:10,.1f} ({low:,.1f}-{high:,.1f}) {unit:9} {ratio:6.2f} x  ".format(**line)
                  + notes)


def machine() -> dict[str, Any]:
    """What the figures hold for. The bandwidth is that of reading, the best of several sums over 256 MB."""
    block = torch.ones(1 << 26)
    best = min(timed(block.sum)[0] for _ in range(20))
    return {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability(),
            "allocator": os.environ.get("LD_PRELOAD", "the system's"), "torch": torch.__version__,
            "transformers": version("transformers"), "tokenizers": version("tokenizers"),
            "read_gb_per_s": round(block.nbytes / best / 1e9, 1)}


def timed(run: Callable[[], Any]) -> list[float]:
    start = time.perf_counter()
    run()
    return [time.perf_counter() - start]


def start_model(directory: str | None) -> tuple[GPT2, Tokenizer | None, str]:
    torch.manual_seed(0)
    return pretrained.load(directory) if directory else (GPT2(GPT2Config()).eval(), None, "lm")


class Transformers:
    """transformers' GPT2LMHeadModel with the weights of ours."""

    def __init__(self, model: GPT2):
        try:
            import transformers
        except ImportError:
            raise UserError("found no transformers, with which to compare; wanted: pip install transformers") from None
        keys = asdict(model.config) | {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**keys)).eval()
        self.model.load_state_dict({"lm_head.weight": model.wte.weight} | {
            f"transformer.{key}": value.T if ".c_" in key and value.dim() == 2 else value
            for key, value in model.named_parameters()}, strict=False)

    def generate(self, prompts: Tensor, n: int, **how: Any) -> list[float]:
        """Seconds to each of n tokens; their ids (B, n) are then in `ids`."""
        stamps = [time.perf_counter()]

        def clock(ids: Tensor, scores: Tensor) -> Tensor:
            stamps.append(time.perf_counter())
            return scores

        ids = self.model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=n,
                                  logits_processor=[clock], **how or {"do_sample": False})
        self.ids: list[list[int]] = ids[:, prompts.shape[1]:].tolist()
        return [b - a for a, b in zip(stamps, stamps[1:], strict=False)]


def greedy(prompts: list[list[int]], n: int) -> list[Request]:
    return [Request(prompt, sampling=Sampling(temperature=0, max_new_tokens=n)) for prompt in prompts]


def full_steps(engine: Engine, requests: list[Request]) -> list[float]:
    """Seconds of each decoding step in which all requests are live."""
    seconds = []
    for request in requests:
        engine.submit(request)
    while not engine.idle:
        full = len(engine.running) == len(requests)
        took = timed(engine.step)
        seconds += took if full else []
    return seconds


def decode(args: argparse.Namespace, report: Report) -> None:
    """Greedy, of random prompts; then how much the smaller dtypes change what the model says."""
    model, text, _ = start_model(args.model)
    config, peer = model.config, Transformers(model)
    first = min(args.first, config.n_positions - 1)
    length = min(config.n_positions, max(args.prompt + args.new, first + 1))
    engines = {dtype: Engine(model, max(args.batches), length, dtype) for dtype in args.dtypes}
    settle()
    weights = torch.ones(sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear)))
    for batch in args.batches:
        prompts = torch.randint(config.vocab_size, (batch, args.prompt))
        asked = greedy(prompts.tolist(), args.new)
        medians = report.race(f"decode, batch {batch}", "tokens/s", {
            "transformers": partial(peer.generate, prompts, args.new),
            **{dtype: partial(full_steps, engine, asked) for dtype, engine in engines.items()},
            "reading float32": lambda: [timed(weights.sum)[0] for _ in range(args.new)]}, args.rounds, batch)
        cached = 8 * config.n_layer * config.n_embd * batch * (args.prompt + args.new / 2)  # bytes
        for dtype in engines:  # the limit is the time to read as many bytes as the step must
            limit = medians["reading float32"] * (weights.numel() * SIZE[dtype] + cached) / weights.nbytes
            report.note(dtype, of_memory_limit=f"{limit / medians[dtype]:.0%}")
        if "float32" in engines:
            same = sum(a[0].ids == ids for a, ids in zip(generate(engines["float32"], asked), peer.ids, strict=True))
            report.note("float32", equal_greedy_rows=f"{same} of {batch}")
    prompts = torch.randint(config.vocab_size, (1, first))
    report.race(f"first token of {first}", "ms", {
        "transformers": partial(peer.generate, prompts, 1),
        **{dtype: partial(timed, partial(generate, engine, greedy(prompts.tolist(), 1)))
           for dtype, engine in engines.items()}}, args.rounds)
    ids = torch.randint(config.vocab_size, (16, min(256, config.n_positions)))
    if text and args.text:
        known = text.encode(Path(args.text).read_text(encoding="utf-8")[:16 * ids.numel()])[:ids.numel()]
        ids = torch.tensor(known[: len(known) // ids.shape[1] * ids.shape[1]]).view(-1, ids.shape[1])
    for dtype, engine in engines.items():
        agreement, perplexity = quality(model, engine.model, ids)
        report.note(dtype, top1_agreement=f"{agreement:.2%}", perplexity=f"{perplexity:.2f}")


@torch.inference_mode()
def quality(model: GPT2, packed: GPT2, ids: Tensor) -> tuple[float, float]:
    """Teacher-forced on the rows `ids`: how often the packed model's best token is the model's, and its perplexity."""
    same, loss = 0.0, 0.0
    for row in ids.split(1):
        wanted, logits = (m.logits(m(row))[0, :-1].float() for m in (model, packed))
        same += (logits.argmax(-1) == wanted.argmax(-1)).float().mean().item() / len(ids)
        loss += F.cross_entropy(logits, row[0, 1:]).item() / len(ids)
    return same, math.exp(loss)


def train_config(args: argparse.Namespace) -> GPT2Config:
    """GPT-2 124M, or the size in --config, without dropout."""
    config = GPT2Config(embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)
    if not args.config:
        return config
    size = (found := load(args.config)).model
    return replace(config, vocab_size=found.tokenizer.vocab_size, n_layer=size.n_layer, n_head=size.n_head,
                   n_embd=size.n_embd, n_positions=size.n_ctx)


def training_step(who: str, args: argparse.Namespace) -> Callable[[], None]:
    """One optimizer step of AdamW on random ids."""
    torch.manual_seed(0)
    model, settings = GPT2(train_config(args)).train(), TrainConfig(compile="compiled" in who)
    ours, ids = "gptchat" in who, torch.randint(model.config.vocab_size, (args.rows, args.row + 1))
    trained = prepare(model, settings, World("cpu")) if ours else Transformers(model).model.train()
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
        settle()
    while pipe.recv():
        pipe.send(timed(step))
    pipe.send(peak_memory(torch.device("cpu")))


def turn(pipe: Connection) -> list[float]:
    pipe.send(True)
    return pipe.recv()


def train(args: argparse.Namespace, report: Report) -> None:
    """Each contestant in its own process: the allocator's settings and the peak memory are a process's."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for who in ("transformers as found", "transformers", "gptchat eager", "gptchat compiled"):
        pipes[who], end = context.Pipe()
        context.Process(target=worker, args=(end, who, args), daemon=True).start()
    tokens = args.rows * args.row
    medians = report.race(f"train, {args.rows} x {args.row}", "tokens/s",
                          {who: partial(turn, pipe) for who, pipe in pipes.items()}, args.rounds, tokens)
    peak = matmul_peak(torch.device("cpu"), torch.bfloat16 if args.precision == "bf16" else torch.float32)
    for who, pipe in pipes.items():
        pipe.send(False)
        share = step_flops(train_config(args), tokens, tokens, args.row) / medians[who] / peak
        report.note(who, of_matmul_peak=f"{share:.0%}", peak_memory_gb=round(pipe.recv() / 1e9, 2))


def tokenizer(args: argparse.Namespace, report: Report) -> None:
    """The training text of a config into shards, by the command, its start and files written and all; `tokenizers` only
    encodes what is in memory."""
    with tempfile.TemporaryDirectory() as folder:
        path, changes = args.config or "configs/lm.toml", [f"data.shards={folder}", "data.valid=[]", "data.test=[]"]
        config, command = load(path, changes), [sys.executable, "-m", "gptchat.shards", "--config", path, *changes]
        text = "".join(path.read_text(encoding="utf-8") for path in expand(config.data.train, "data.train"))
        blocks, backend = text.split("\n\n"), for_config(config).backend
        report.race("encode", "MB/s", {
            "tokenizers": lambda: timed(lambda: backend.encode_batch_fast(blocks)),
            "gptchat.shards": lambda: timed(lambda: subprocess.run(command, check=True, capture_output=True))},
            args.rounds, len(text.encode()) / 1e6)


def ask(url: str, prompt: list[int], n: int, stream: bool) -> tuple[list[float], int]:
    """One request to the completions API: seconds to the first chunk and between the further ones, and tokens."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": n, "seed": 1}
    body |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    headers, stamps, tokens = {"content-type": "application/json"}, [time.perf_counter()], 0
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=600) as answer:
        for line in filter(lambda line: line.startswith((b"data: {", b"{")), answer):
            stamps.append(time.perf_counter())
            usage = json.loads(line.removeprefix(b"data: ")).get("usage") or {}
            tokens = usage.get("completion_tokens", tokens)
    return [b - a for a, b in zip(stamps, stamps[1:], strict=False)], tokens


def serve(args: argparse.Namespace, report: Report) -> None:
    """Clients at once, each with one request a round, random prompt and draws; seconds per token, all clients
    together."""
    model, text, task = start_model(args.model)
    if not text:
        raise UserError("serve: found no --model; wanted the directory of the model that runs at --url")
    peer, lock, engine = Transformers(model), Lock(), Engine(model, max(args.clients), dtype=args.dtypes[0])
    prompt = torch.randint(len(text.token_bytes), (args.prompt,)).tolist()
    types = [1] * len(prompt) if task == "chatlm" else None
    request = Request(prompt, types, Sampling(seed=1, max_new_tokens=args.new), 1, (pretrained.stop_id(text, task),))
    firsts: list[float] = []
    gaps: list[float] = []
    threads = ThreadPoolExecutor(max(args.clients))

    def locked(_: int) -> int:
        with lock:
            return len(peer.generate(torch.tensor([prompt]), args.new, do_sample=True))

    def served(stream: bool, _: int) -> int:
        (first, *others), tokens = ask(args.url, prompt, args.new, stream)
        firsts.extend([first] * stream)
        gaps.extend(others)
        return tokens

    def alone(numbers: range) -> list[int]:
        return [len(answer[0].ids) for answer in generate(engine, [request] * len(numbers))]

    def per_token(run: Callable[[range], Iterable[int]], n: int) -> list[float]:
        start, tokens = time.perf_counter(), sum(run(range(n)))
        return [(time.perf_counter() - start) / max(1, tokens)]

    for n in args.clients:
        firsts.clear()
        gaps.clear()
        report.race(f"{n} clients", "tokens/s", {
            "transformers, one lock": partial(per_token, partial(threads.map, locked), n),
            "engine alone": partial(per_token, alone, n),
            "server": partial(per_token, partial(threads.map, partial(served, True)), n),
            "server, not streamed": partial(per_token, partial(threads.map, partial(served, False)), n)}, args.rounds)
        middle, *_, highest = (value * 1e3 for value in statistics.quantiles(gaps, n=100)[49::49])
        report.note("server", first_token_ms=f"{statistics.median(firsts) * 1e3:.0f}",
                    token_ms=f"{middle:.1f}", token_p99_ms=f"{highest:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gptchat.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("decode", "train", "tokenizer", "serve"))
    parser.add_argument("--model", metavar="DIR", help="default: 124M, random weights")
    parser.add_argument("--config", metavar="FILE", help="train: sizes; tokenizer: texts (default configs/lm.toml)")
    parser.add_argument("--text", metavar="FILE", help="decode: what perplexity is measured on, with --model")
    parser.add_argument("--url", default="http://127.0.0.1:8080/predictions/chatlm/1.0/v1/completions")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    for name, default in (("batches", [1, 8, 32]), ("clients", [1, 8, 32, 64])):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=default)
    for name, number in (("rounds", 3), ("prompt", 32), ("new", 64), ("first", 512), ("rows", 4), ("row", 256),
                         ("threads", torch.get_num_threads())):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--json", action="store_true")
    args, report = parser.parse_args(), Report()
    torch.set_num_threads(args.threads)
    {"decode": decode, "train": train, "tokenizer": tokenizer, "serve": serve}[args.what](args, report)
    report.show(args.json)


if __name__ == "__main__":
    cli(main)

"""`gptchat bench decode`: generating text, beside transformers' `generate` with the same weights.

Measures decoding steps at several batch sizes, the first token after a long prompt, and the first
token of a conversation's next turn with and without the prefix cache; with --text also the
perplexity of each dtype. Prompts are random ids. transformers runs in float32.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gptchat.bench import Report, check_context, positive, timed, wait_for_device
from gptchat.console import UserError
from gptchat.data.tokenizer import Tokenizer
from gptchat.inference.engine import Engine, Request, generate
from gptchat.inference.linear import DTYPES
from gptchat.inference.prefix_cache import PrefixCache
from gptchat.inference.sampling import Sampling
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.model.weights import hugging_face_state
from gptchat.runtime import default_device, tune_memory

TURN = 20  # tokens of a message, and of an answer, in a conversation
GPU_DTYPES = ("float32", "bfloat16")  # int8's kernel is for CPUs

Contestants = dict[str, Callable[[], list[float]]]


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    dtypes = DTYPES if default_device() == "cpu" else GPU_DTYPES
    batches = [1, 8, 32]
    add("--model", metavar="DIR", help="model directory (default: GPT-2 124M with random weights)")
    add("--text", metavar="FILE", help="measure perplexity on this text; needs --model")
    dtypes_help = f"of our weights ({' '.join(dtypes)})"
    add("--dtypes", nargs="+", default=dtypes, choices=DTYPES, help=dtypes_help)
    batches_help = f"sizes ({' '.join(map(str, batches))})"
    add("--batches", nargs="+", type=positive, default=batches, help=batches_help)
    add("--sampled", action="store_true", help="draw by the model's own settings, not greedily")
    add("--prompt", type=positive, default=32, help="tokens of a prompt (%(default)s)")
    add("--new", type=positive, default=64, help="new tokens per row (%(default)s)")
    add("--first", type=positive, default=512, help="tokens before the first one (%(default)s)")


def benchmark_model(directory: str | None) -> tuple[GPT2, Tokenizer | None, str]:
    """The model, tokenizer and task of a directory; without one, GPT-2 124M with seeded weights."""
    torch.manual_seed(0)
    if directory:
        return pretrained.load_model(directory, default_device())
    return GPT2(GPT2Config()).to(default_device()).eval(), None, "lm"


class Transformers:
    """transformers' GPT2LMHeadModel with the weights of ours, on the same device."""

    def __init__(self, model: GPT2):
        try:
            import transformers
        except ImportError:
            raise UserError(
                "found no transformers, with which to compare; wanted: pip install transformers"
            ) from None
        keys = asdict(model.config) | {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**keys)).eval()
        state = hugging_face_state(model)
        self.model.load_state_dict({"lm_head.weight": model.wte.weight} | state, strict=False)
        self.model.to(model.wte.weight.device)

    def generate(self, prompts: Tensor, n: int, sampling: Sampling) -> list[float]:
        """Generate `n` tokens after each of `prompts` (B, T). Returns the seconds of each step.

        The first step includes the prompt. The new tokens (B, n) are left in `new_ids`.
        """
        stamps = [time.perf_counter()]

        def record_time(ids: Tensor, scores: Tensor) -> Tensor:
            wait_for_device()
            stamps.append(time.perf_counter())
            return scores

        settings = {}
        if sampling.temperature > 0:
            names = ("temperature", "top_k", "top_p", "repetition_penalty")
            settings = {name: getattr(sampling, name) for name in names}
        prompts = prompts.to(self.model.device)
        ids = self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=n,
            logits_processor=[record_time],
            do_sample=sampling.temperature > 0,
            **settings,
        )
        self.new_ids: list[list[int]] = ids[:, prompts.shape[1] :].tolist()
        return differences(stamps)


def differences(stamps: list[float]) -> list[float]:
    return [end - start for start, end in zip(stamps, stamps[1:], strict=False)]


def requests_for(prompts: Tensor, n: int, sampling: Sampling) -> list[Request]:
    """A request for `n` tokens after each of `prompts` (B, T)."""
    return [
        Request(prompt, sampling=replace(sampling, max_new_tokens=n, seed=seed))
        for seed, prompt in enumerate(prompts.tolist())
    ]


def full_steps(engine: Engine, requests: list[Request]) -> list[float]:
    """The seconds of each decoding step in which all requests are running."""
    seconds = []
    for request in requests:
        engine.submit(request)
    while not engine.idle:
        all_running = len(engine.running) == len(requests)
        step_seconds = timed(engine.step)
        if all_running:
            seconds += step_seconds
    return seconds


class DecodeBenchmark:
    """One model in all its dtypes and in transformers; one method per measurement."""

    def __init__(self, args: argparse.Namespace, report: Report):
        if (args.text or args.sampled) and not args.model:
            raise UserError("--text and --sampled: found no --model; wanted one, whose they are")
        self.args = args
        self.report = report
        self.model, self.tokenizer, _ = benchmark_model(args.model)
        self.vocab_size = self.model.config.vocab_size
        n_ctx = self.model.config.n_positions
        check_context(args.prompt + args.new, "--prompt and --new", n_ctx)
        self.first = min(args.first, n_ctx - 1)
        if self.first <= 2 * TURN:
            raise UserError(f"--first: found {self.first} tokens; wanted more than {2 * TURN}")
        if args.text:
            assert self.tokenizer is not None  # --text needs --model
            self.rows = text_rows(args.text, self.tokenizer, min(256, n_ctx))
        self.sampling = Sampling(temperature=0)
        if args.sampled:
            self.sampling = Sampling(**pretrained.answer_defaults(args.model).sampling)
        self.peer = Transformers(self.model)
        slots = max(args.batches)
        length = max(args.prompt + args.new, self.first + 1)
        self.engines = {dtype: Engine(self.model, slots, length, dtype) for dtype in args.dtypes}

    def race_steps(self, batch: int) -> None:
        prompts = torch.randint(self.vocab_size, (batch, self.args.prompt))
        requests = requests_for(prompts, self.args.new, self.sampling)
        contestants: Contestants = {
            "transformers": partial(self.peer.generate, prompts, self.args.new, self.sampling)
        }
        for dtype, engine in self.engines.items():
            contestants[dtype] = partial(full_steps, engine, requests)
        self.report.race(f"decode, batch {batch}", "tokens/s", contestants, self.args.rounds, batch)
        if "float32" in self.engines and self.sampling.temperature == 0:
            answers = generate(self.engines["float32"], requests)
            # The peer's last turn in the race left its tokens in `new_ids`.
            pairs = zip(answers, self.peer.new_ids, strict=True)
            equal = sum(candidates[0].ids == ids for candidates, ids in pairs)
            self.report.note("float32", equal_greedy_rows=f"{equal} of {batch}")

    def race_first_token(self) -> None:
        prompts = torch.randint(self.vocab_size, (1, self.first))
        contestants: Contestants = {
            "transformers": partial(self.peer.generate, prompts, 1, self.sampling)
        }
        requests = requests_for(prompts, 1, self.sampling)
        for dtype, engine in self.engines.items():
            contestants[dtype] = partial(timed, partial(generate, engine, requests))
        self.report.race(f"first token of {self.first}", "ms", contestants, self.args.rounds)

    def race_next_turn(self) -> None:
        """Race the first token of a conversation's next turn."""
        contestants: Contestants = {}
        for dtype, engine in self.engines.items():
            contestants[f"{dtype}, computed anew"] = partial(self.next_turn, engine, False)
            contestants[f"{dtype}, cached"] = partial(self.next_turn, engine, True)
        self.report.race(f"next turn at {self.first}", "ms", contestants, self.args.rounds)

    def next_turn(self, engine: Engine, prefix_cache: bool) -> list[float]:
        """The seconds to the first token after a history, the engine's answer and a message."""
        engine.prefix_cache = PrefixCache(engine.cache, engine.slots, prefix_cache)
        history = torch.randint(self.vocab_size, (1, self.first - 2 * TURN))
        message = torch.randint(self.vocab_size, (1, TURN))
        [[answer]] = generate(engine, requests_for(history, TURN, self.sampling))
        prompt = torch.cat([history, torch.tensor([answer.ids]), message], 1)
        return timed(partial(generate, engine, requests_for(prompt, 1, self.sampling)))

    def note_perplexity(self) -> None:
        for dtype, engine in self.engines.items():
            self.report.note(dtype, perplexity=f"{perplexity(engine.model, self.rows):.2f}")


def text_rows(path: str, tokenizer: Tokenizer, length: int) -> Tensor:
    """Ids (B, `length`) of the beginning of a text, at most 16 rows. Raises UserError for none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; wanted a text in UTF-8") from None
    ids = tokenizer.encode(text[: 256 * length])  # 16 characters a token: plenty
    rows = min(16, len(ids) // length)
    if rows == 0:
        raise UserError(f"{path}: found {len(ids)} tokens; wanted {length} or more")
    return torch.tensor(ids[: rows * length]).view(rows, length)


@torch.inference_mode()
def perplexity(model: GPT2, ids: Tensor) -> float:
    """The perplexity of the rows `ids` (B, T)."""
    loss = 0.0
    for row in ids.to(model.wte.weight.device):  # (T,)
        logits = model.logits(model.hidden(row[None]))[0, :-1].float()  # (T - 1, V)
        loss += F.cross_entropy(logits, row[1:]).item() / len(ids)
    return math.exp(loss)


def run(args: argparse.Namespace, report: Report) -> None:
    benchmark = DecodeBenchmark(args, report)
    tune_memory()
    for batch in args.batches:
        benchmark.race_steps(batch)
    benchmark.race_first_token()
    if args.text:
        benchmark.note_perplexity()
    benchmark.race_next_turn()

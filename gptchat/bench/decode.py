"""`gptchat bench decode`: greedy decoding of random prompts, beside transformers' `generate`.

On a GPU where there is one, else on the CPU. Four measurements, each for our weights in float32,
bfloat16 and, on a CPU, int8 (transformers: float32 only): the speed of decoding steps at several
batch sizes, the time to the first token of a long prompt, the same of a conversation's next turn
with and without the prefix cache, and how far the smaller dtypes change the model's predictions.
Decoding is also compared with the limit that memory sets: a step reads all weights and all cached
keys and values once, and cannot be faster than a plain sum over as many bytes. The model is
--model, or GPT-2 124M with random weights.

Invariant: all contestants of a race start from the same float32 weights and the same prompts.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptchat.bench.report import Report, check_context, positive, timed, wait_for_device
from gptchat.console import UserError
from gptchat.data.tokenizer import Tokenizer
from gptchat.inference.engine import Engine, Request, generate
from gptchat.inference.linear import DTYPES
from gptchat.inference.prefix_cache import PrefixCache
from gptchat.inference.sampling import Sampling
from gptchat.model import pretrained
from gptchat.model.devices import default_device
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.model.weight_files import hugging_face_state
from gptchat.runtime import tune_memory

TURN = 20  # tokens of a message, and of an answer, in a conversation
GPU_DTYPES = ("float32", "bfloat16")  # int8's kernel is for CPUs
BYTES_PER_WEIGHT = {"float32": 4, "bfloat16": 2, "int8": 1}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="DIR", help="model directory (default: GPT-2 124M with random weights)")
    add("--text", metavar="FILE", help="measure perplexity on this text; needs --model")
    add(
        "--dtypes",
        nargs="+",
        default=DTYPES if default_device() == "cpu" else GPU_DTYPES,
        choices=DTYPES,
        help="dtypes of our weights (default: all that the device has)",
    )
    add(
        "--batches",
        nargs="+",
        metavar="N",
        type=positive,
        default=[1, 8, 32],
        help="batch sizes (default: 1 8 32)",
    )
    add("--prompt", type=positive, default=32, help="tokens of a prompt (%(default)s)")
    add("--new", type=positive, default=64, help="new tokens per row (%(default)s)")
    add(
        "--first",
        type=positive,
        default=512,
        help="prompt before the first token (%(default)s)",
    )
    add(
        "--history",
        type=positive,
        default=600,
        help="tokens of a conversation before its next turn (%(default)s)",
    )


def benchmark_model(directory: str | None) -> tuple[GPT2, Tokenizer | None, str]:
    """The model, tokenizer and task of a directory; without one, GPT-2 124M with seeded weights.

    The model is on a GPU where there is one.
    """
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

    def generate(self, prompts: Tensor, n: int, do_sample: bool = False) -> list[float]:
        """Generate `n` tokens after each of `prompts` (B, T). Returns the seconds of each token.

        The first one includes the prompt. The new tokens (B, n) are left in `new_ids`.
        """
        stamps = [time.perf_counter()]

        def record_time(ids: Tensor, scores: Tensor) -> Tensor:
            wait_for_device()
            stamps.append(time.perf_counter())
            return scores

        prompts = prompts.to(self.model.device)
        ids = self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=n,
            logits_processor=[record_time],
            do_sample=do_sample,
        )
        self.new_ids: list[list[int]] = ids[:, prompts.shape[1] :].tolist()
        return differences(stamps)


def differences(stamps: list[float]) -> list[float]:
    return [end - start for start, end in zip(stamps, stamps[1:], strict=False)]


def greedy_requests(prompts: Tensor, n: int) -> list[Request]:
    """A request for `n` greedy tokens after each of `prompts` (B, T)."""
    sampling = Sampling(temperature=0, max_new_tokens=n)
    return [Request(prompt, sampling=sampling) for prompt in prompts.tolist()]


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
        self.args = args
        self.report = report
        if args.text and not args.model:
            raise UserError(
                "--text: found no --model; wanted one, whose tokenizer encodes the text"
            )
        self.model, self.tokenizer, _ = benchmark_model(args.model)
        self.config = self.model.config
        check_context(args.prompt + args.new, "--prompt and --new", self.config.n_positions)
        self.rows = self.rows_to_predict()
        self.peer = Transformers(self.model)
        self.first_length = min(args.first, self.config.n_positions - 1)
        check_context(2 * TURN + 2, "a conversation's next turn", self.config.n_positions)
        self.history = max(TURN + 1, min(args.history, self.config.n_positions - TURN - 1))
        length = max(args.prompt + args.new, self.first_length + 1, self.history + TURN + 1)
        length = min(length, self.config.n_positions)
        slots = max(args.batches)
        self.engines = {dtype: Engine(self.model, slots, length, dtype) for dtype in args.dtypes}
        linear_layers = [layer for layer in self.model.modules() if isinstance(layer, nn.Linear)]
        # As many float32 numbers as a step reads weights.
        n_weights = sum(layer.weight.numel() for layer in linear_layers)
        self.block = torch.ones(n_weights, device=self.model.wte.weight.device)

    def race_steps(self, batch: int) -> None:
        """Race the decoding steps of a batch; note how near each dtype comes to memory's limit."""
        args = self.args
        prompts = torch.randint(self.config.vocab_size, (batch, args.prompt))
        requests = greedy_requests(prompts, args.new)
        contestants: dict[str, Callable[[], list[float]]] = {}
        contestants["transformers"] = partial(self.peer.generate, prompts, args.new)
        for dtype, engine in self.engines.items():
            contestants[dtype] = partial(full_steps, engine, requests)
        contestants["reading float32"] = self.read_block
        medians = self.report.race(
            f"decode, batch {batch}", "tokens/s", contestants, args.rounds, batch
        )
        mean_length = args.prompt + args.new / 2
        n_cached = 2 * self.config.n_layer * self.config.n_embd * batch * mean_length
        seconds_per_byte = medians["reading float32"] / self.block.nbytes
        for dtype, engine in self.engines.items():
            weight_bytes = self.block.numel() * BYTES_PER_WEIGHT[dtype]
            cache_bytes = n_cached * engine.cache.kv.element_size()
            limit = seconds_per_byte * (weight_bytes + cache_bytes)
            self.report.note(dtype, of_memory_limit=f"{limit / medians[dtype]:.0%}")
        if "float32" in self.engines:
            answers = generate(self.engines["float32"], requests)
            # The peer's last turn in the race left its tokens in `new_ids`.
            pairs = zip(answers, self.peer.new_ids, strict=True)
            equal = sum(candidates[0].ids == ids for candidates, ids in pairs)
            self.report.note("float32", equal_greedy_rows=f"{equal} of {batch}")

    def read_block(self) -> list[float]:
        """The seconds of one sum over the block, once per new token."""
        return [timed(self.block.sum)[0] for _ in range(self.args.new)]

    def race_first_token(self) -> None:
        prompts = torch.randint(self.config.vocab_size, (1, self.first_length))
        requests = greedy_requests(prompts, 1)
        contestants: dict[str, Callable[[], list[float]]] = {}
        contestants["transformers"] = partial(self.peer.generate, prompts, 1)
        for dtype, engine in self.engines.items():
            contestants[dtype] = partial(timed, partial(generate, engine, requests))
        self.report.race(f"first token of {self.first_length}", "ms", contestants, self.args.rounds)

    def race_next_turn(self) -> None:
        """Race the first token of a conversation's next turn, without and with the prefix cache."""
        contestants: dict[str, Callable[[], list[float]]] = {}
        for dtype, engine in self.engines.items():
            for who, enabled in ((f"{dtype}, computed anew", False), (f"{dtype}, cached", True)):
                contestants[who] = partial(self.next_turn, engine, enabled)
        what = f"next turn after {self.history}"
        medians = self.report.race(what, "ms", contestants, self.args.rounds)
        for dtype in self.engines:
            anew, cached = medians[f"{dtype}, computed anew"], medians[f"{dtype}, cached"]
            self.report.note(f"{dtype}, cached", of_computed_anew=f"{cached / anew:.0%}")

    def next_turn(self, engine: Engine, prefix_cache: bool) -> list[float]:
        """The seconds to the first token after a history and a message.

        The history is new. Its end is an answer of the engine's.
        """
        engine.prefix_cache = PrefixCache(engine.cache, engine.slots, prefix_cache)
        prompt, message = torch.randint(self.config.vocab_size, (1, self.history)).split(
            [self.history - TURN, TURN], 1
        )
        [[answer]] = generate(engine, greedy_requests(prompt, TURN))
        next_prompt = torch.cat([prompt, torch.tensor([answer.ids]), message], 1)
        return timed(partial(generate, engine, greedy_requests(next_prompt, 1)))

    def compare_predictions(self) -> None:
        """Note each dtype's agreement with float32 and its perplexity, on its latest line."""
        for dtype, engine in self.engines.items():
            agreement, perplexity = quality(self.model, engine.model, self.rows)
            notes = {"top1_agreement": f"{agreement:.2%}", "perplexity": f"{perplexity:.2f}"}
            self.report.note(dtype, **notes)

    def rows_to_predict(self) -> Tensor:
        """Ids (B, T), at most 16 rows of 256: the beginning of --text, else random ones."""
        rows, length = 16, min(256, self.config.n_positions)
        if not self.tokenizer or not self.args.text:
            return torch.randint(self.config.vocab_size, (rows, length))
        n_ids = rows * length
        try:
            text = Path(self.args.text).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.args.text}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{self.args.text}: not valid UTF-8; wanted a text") from None
        ids = self.tokenizer.encode(text[: 16 * n_ids])[:n_ids]  # 16 characters a token: plenty
        whole_rows = len(ids) // length
        if whole_rows == 0:
            raise UserError(f"{self.args.text}: found {len(ids)} tokens; wanted {length} or more")
        return torch.tensor(ids[: whole_rows * length]).view(-1, length)


@torch.inference_mode()
def quality(model: GPT2, candidate: GPT2, ids: Tensor) -> tuple[float, float]:
    """How well `candidate`, which is `model` in another dtype, predicts the rows `ids` (B, T).

    Returns the share of positions where both models' best token is the same, and the perplexity of
    `candidate`.
    """
    agreement, loss = 0.0, 0.0
    for row in ids.to(model.wte.weight.device).split(1):  # (1, T)
        reference = model.logits(model.hidden(row))[0, :-1].float()  # (T - 1, V)
        logits = candidate.logits(candidate.hidden(row))[0, :-1].float()  # (T - 1, V)
        same = logits.argmax(-1) == reference.argmax(-1)
        agreement += same.float().mean().item() / len(ids)
        loss += F.cross_entropy(logits, row[0, 1:]).item() / len(ids)
    return agreement, math.exp(loss)


def run(args: argparse.Namespace, report: Report) -> None:
    benchmark = DecodeBenchmark(args, report)
    tune_memory()
    for batch in args.batches:
        benchmark.race_steps(batch)
    benchmark.race_first_token()
    benchmark.compare_predictions()
    benchmark.race_next_turn()

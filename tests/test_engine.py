"""The engine: each answer is that of its request alone, whatever the traffic, and transformers'."""

import dataclasses
import itertools
import random

import pytest
import tokenizers
import torch
from conftest import count_equal_greedy
from transformers import GPT2Config as TheirConfig
from transformers import GPT2LMHeadModel

from gptchat.data.tokenizer import BYTE_OF, Tokenizer
from gptchat.inference.engine import Engine, Request, generate
from gptchat.inference.linear import DTYPES
from gptchat.inference.sampling import Sampling
from gptchat.inference.text import StreamDecoder, WordFilter
from gptchat.model.gpt2 import GPT2, NO_TYPE_ROWS, GPT2Config
from gptchat.model.weights import hugging_face_state
from tests.hf_models import BadWords

V, LENGTH = 97, 64
CONFIG = GPT2Config(
    vocab_size=V, n_positions=LENGTH, n_embd=32, n_layer=3, n_head=4, type_rows=(1, 7)
)


@pytest.fixture(scope="module")
def model():
    """A tiny float32 model with no tensor at its initial value, and clearly different logits."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    model = GPT2(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.zero_()
            parameter.add_(
                torch.randn(parameter.shape, generator=generator)
                * (0.4 if parameter.dim() == 2 else 0.1)
            )
    return model


@pytest.fixture(scope="module")
def peer(model):
    """The same weights in transformers."""
    c = CONFIG
    peer = GPT2LMHeadModel(
        TheirConfig(
            vocab_size=V,
            n_positions=LENGTH,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    own = hugging_face_state(model)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.copy_(own[name])
    return peer


def prompt(random_, longest=LENGTH - 1):
    return [random_.randrange(V) for _ in range(random_.randint(1, longest))]


def some_request(random_):
    ids = prompt(random_)
    settings = dict(
        temperature=random_.choice([0, 0.6, 1.0, 1.7]),
        top_k=random_.choice([0, 0, 1, 20]),
        top_p=random_.choice([1.0, 0.9, 0.3]),
        min_p=random_.choice([0.0, 0.05]),
        repetition_penalty=random_.choice([1.0, 1.0, 1.4]),
        frequency_penalty=random_.choice([0, 0, 0.8]),
        presence_penalty=random_.choice([0, 0, -0.7]),
        logit_bias=random_.choice([{}, {}, {random_.randrange(V): 5, 3: -100}]),
        min_tokens=random_.choice([0, 0, 4]),
        seed=random_.randrange(5),
        word_filter=random_.choice(
            [None, BadWords([[random_.randrange(V)] for _ in range(20)]), BadWords([[3, 4], [5]])]
        ),
        max_new_tokens=random_.choice([0, 1, 5, 20, 99]),
        logprobs=random_.choice([None, None, 0, 3]),
        whole_characters=len(ids) % 2,
    )
    return Request(
        ids,
        [random_.randrange(2) for _ in ids],
        Sampling(**settings),
        n=random_.choice([1, 1, 1, 2, 5]),
        stop_ids=random_.choice([(), (4,), (4, *range(40, 60))]),
        score_prompt=random_.random() < 0.3,
    )


def close(a, b):
    return all(
        x.token == y.token and [t for t, _ in x.scored.top] == [t for t, _ in y.scored.top]
        for x, y in zip(a, b, strict=True)
    ) and [x.scored.logprob for x in a] == pytest.approx([y.scored.logprob for y in b], abs=1e-4)


class Traffic:
    """Requests that come and go at random times through one engine."""

    def __init__(self, model, number, seed, dtype="float32", **settings):
        self.random = random.Random(seed)
        self.engine = Engine(model, slots=8, suppress=(0, 1), dtype=dtype, **settings)
        self.expected = [some_request(self.random) for _ in range(number)]
        self.requests, self.answers, self.ended, self.cancelled = {}, {}, {}, {}

    def run(self):
        coming = list(self.expected)
        while coming or not self.engine.idle:
            for _ in range(self.random.choice([0, 0, 0, 1, 1, 6])):
                if coming:
                    request = coming.pop()
                    self.requests[self.engine.submit(request)] = request
            if self.requests and self.random.random() < 0.1:
                self.leave()
            for output in self.engine.step():
                self.take(output)
            self.check()
        return self

    def leave(self):
        id_ = self.random.choice(list(self.requests))
        candidate = self.random.choice([None, *range(self.requests[id_].n)])
        before, waiting = self.engine.live, self.engine.queued
        own = sum(
            row.request_id == id_ and candidate in (None, row.candidate)
            for row in self.engine.running
        )
        self.engine.cancel(id_, candidate)
        assert self.engine.live <= before - own and self.engine.queued <= waiting
        for one in range(self.requests[id_].n) if candidate is None else [candidate]:
            if (id_, one) not in self.ended:
                self.cancelled[id_, one] = True

    def take(self, output):
        key = output.request_id, output.candidate
        assert key not in self.ended and key not in self.cancelled
        if output.token is not None:
            self.answers.setdefault(key, []).append(output)
        if output.finish_reason:
            self.ended[key] = output.finish_reason

    def check(self):
        engine = self.engine
        assert engine.live <= engine.slots
        keys = [(row.request_id, row.candidate) for row in engine.running]
        assert len(set(keys)) == len(keys)
        assert not any(key in self.ended or key in self.cancelled for key in keys)


@pytest.mark.parametrize(
    "seed, chunk, prefix_cache", [(0, 256, False), (1, 7, False), (2, 1, False), (4, 16, True)]
)
def test_each_request_in_traffic_answers_as_alone(model, seed, chunk, prefix_cache):
    number = 40
    traffic = Traffic(model, number, seed, prefill_chunk=chunk, prefix_cache=prefix_cache).run()
    assert traffic.engine.live == traffic.engine.queued == 0 and traffic.engine.idle
    assert (
        len(traffic.requests) == number
        and traffic.cancelled
        and set(traffic.ended.values()) == {"stop", "length"}
    )
    alone = Engine(model, slots=8, suppress=(0, 1), dtype="float32")
    compared = 0
    for id_, request in traffic.requests.items():
        [wanted] = generate(alone, [request])
        for candidate, completion in enumerate(wanted):
            key = id_, candidate
            got = traffic.answers.get(key, [])
            if key in traffic.cancelled:
                assert [o.token for o in got] == completion.ids[: len(got)]
            else:
                assert close(got, [output for output in completion if output.token is not None]), (
                    key,
                    request,
                )
                assert traffic.ended[key] == completion[-1].finish_reason
                compared += len(got)
    assert compared > number


def theirs(peer, request, suppress=()):
    """Greedy ids by transformers, which continues the last token's type too."""
    ids, sampling = torch.tensor([request.input_ids]), request.sampling
    types = (
        torch.tensor(CONFIG.type_rows)[torch.tensor([request.token_type_ids])]
        if request.token_type_ids
        else None
    )
    drawn = peer.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        token_type_ids=types,
        max_new_tokens=min(sampling.max_new_tokens, LENGTH - ids.shape[1]),
        do_sample=False,
        pad_token_id=0,
        suppress_tokens=list(suppress) or None,
        repetition_penalty=sampling.repetition_penalty,
        bad_words_ids=sampling.word_filter.words if sampling.word_filter else None,
        sequence_bias={(id_,): float(b) for id_, b in sampling.logit_bias.items()} or None,
    )
    return drawn[0, len(request.input_ids) :].tolist()


@pytest.mark.parametrize("typed, prefix_cache", [(True, False), (False, False), (True, True)])
def test_greedy_equals_transformers_generate(model, peer, typed, prefix_cache):
    random_ = random.Random(3)
    requests = []
    for i in range(12):
        ids = prompt(random_, 50)
        requests.append(
            Request(
                ids,
                [random_.randrange(2) for _ in ids] if typed else None,
                Sampling(
                    temperature=0,
                    max_new_tokens=12,
                    repetition_penalty=random_.choice([1.0, 1.3]),
                    word_filter=BadWords([[2, 3], [i]]),
                ),
            )
        )
    engine = Engine(model, slots=5, suppress=(0, 1, 2), prefill_chunk=16, prefix_cache=prefix_cache)
    for _ in range(2 if prefix_cache else 1):  # the second time from what is cached
        answers = [a.ids for [a] in generate(engine, requests)]
    assert answers == [theirs(peer, request, (0, 1, 2)) for request in requests]
    assert len({tuple(a) for a in answers}) > 10


@pytest.mark.parametrize("chunk", [256, 5])
@pytest.mark.parametrize("new", [0, 2])
def test_prompt_scores_equal_transformers_log_softmax(model, peer, chunk, new):
    ids = prompt(random.Random(4), 50)
    with torch.no_grad():
        wanted = peer(torch.tensor([ids])).logits[0].log_softmax(-1)
    engine = Engine(model, prefill_chunk=chunk)
    request = Request(
        ids,
        sampling=Sampling(max_new_tokens=new, logprobs=4, temperature=0),
        score_prompt=True,
        n=2,
    )
    [[first, second]] = generate(engine, [request])
    scored = first[0].prompt_logprobs
    assert (
        [s.token for s in scored] == ids
        and scored[0].logprob is None
        and second[0].prompt_logprobs is None
    )
    of_ids = wanted[range(len(ids) - 1), ids[1:]].tolist()
    assert [s.logprob for s in scored[1:]] == pytest.approx(of_ids, abs=1e-4)
    for i, s in enumerate(scored[1:]):
        assert [token for token, _ in s.top] == wanted[i].topk(4).indices.tolist()
    assert len(first.ids) == new and first[-1].finish_reason == second[-1].finish_reason == "length"
    if new:
        assert first[0].scored.logprob == pytest.approx(wanted[-1].max().item(), abs=1e-4)


def test_stop_id_ends_the_answer_and_is_not_emitted(model):
    request = Request([5, 6], sampling=Sampling(max_new_tokens=40, seed=1))
    [[whole]] = generate(Engine(model), [request])
    stop = whole.ids[9]
    [[cut]] = generate(
        Engine(model), [Request([5, 6], sampling=request.sampling, stop_ids=(stop,))]
    )
    assert cut.ids == whole.ids[: whole.ids.index(stop)] and cut[-1].finish_reason == "stop"


def test_candidates_differ_and_each_is_the_one_of_its_number(model):
    sampling = Sampling(max_new_tokens=10, seed=1)
    [five] = generate(Engine(model), [Request([5, 6], sampling=sampling, n=5)])
    [two] = generate(Engine(model), [Request([5, 6], sampling=sampling, n=2)])
    assert len({tuple(a.ids) for a in five}) == 5 and [a.ids for a in two] == [
        a.ids for a in five[:2]
    ]


def test_an_answer_whose_every_id_is_forbidden_stops(model):
    sampling = Sampling(word_filter=BadWords([[i] for i in range(V)]))
    [[none], [some]] = generate(Engine(model), [Request([1], sampling=sampling), Request([1])])
    assert none.ids == [] and none[-1].finish_reason == "stop" and len(some.ids) == LENGTH - 1


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_does_not_stay_in_a_slot(dtype, prefix_cache, bad):
    """An id whose embedding is broken ends its own answers, not those that come after it."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=99, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    model = GPT2(config).eval()
    with torch.no_grad():
        head = model.wte.weight.detach().clone() * 20
        model.lm_head.weight = torch.nn.Parameter(head)
        model.wte.weight[7] = bad

    def short_answer_beside_a_long_one(engine):
        """The long one's slot makes the other slot's old positions part of what is computed."""
        greedy = Sampling(temperature=0, max_new_tokens=12)
        engine.submit(Request(list(range(20, 50)), sampling=greedy))
        engine.step()
        short = engine.submit(Request([1, 2, 3], sampling=greedy))
        outputs = []
        while not engine.idle:
            outputs += [output for output in engine.step() if output.request_id == short]
        return [output.token for output in outputs]

    engine = Engine(model, slots=2, dtype=dtype, prefix_cache=prefix_cache)
    wanted = short_answer_beside_a_long_one(engine)
    assert len(wanted) == 12
    engine = Engine(model, slots=2, dtype=dtype, prefix_cache=prefix_cache)
    for [answer] in generate(engine, [Request([9] * 20 + [7] * 10)] * 2):
        assert answer.ids == [] and answer[-1].finish_reason == "stop"
    assert short_answer_beside_a_long_one(engine) == wanted


def test_a_long_prompt_does_not_stall_the_others(model):
    engine = Engine(model, slots=3, prefill_chunk=8)
    first = engine.submit(Request([1], sampling=Sampling(max_new_tokens=50)))
    engine.step()
    long = engine.submit(Request([2] * 60))
    short = engine.submit(Request([3]))
    speakers = [[output.request_id for output in engine.step()] for _ in range(9)]
    assert all(first in ids for ids in speakers)
    assert speakers[6:] == [
        [first],
        [first, long],
        [first, long, short],
    ]  # first come, first served


def test_short_prompts_that_fit_in_a_chunk_start_together(model):
    engine = Engine(model, slots=8, prefill_chunk=24)
    ids = [
        engine.submit(Request(p, n=n))
        for p, n in (([1] * 5, 1), ([2] * 8, 2), ([3], 1), ([4] * 2, 1), ([5], 2))
    ]
    started = [
        [(output.request_id, output.candidate) for output in engine.step()] for _ in range(3)
    ]
    first = [
        (ids[0], 0),
        (ids[1], 0),
        (ids[2], 0),
        (ids[1], 1),
    ]  # three rows of 8; a fourth would be 32
    second = [(ids[3], 0), (ids[4], 0), (ids[4], 1)]
    assert started == [first, first + second, first + second]


def test_a_model_stays_as_it_was(model):
    model.train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    generate(Engine(model, dtype="int8"), [Request([1], sampling=Sampling(max_new_tokens=2))])
    assert model.training and all(
        torch.equal(before[name], p) for name, p in model.named_parameters()
    )


@pytest.mark.parametrize(
    "dtype, rounding", [(None, 1e-4), ("float32", 1e-4), ("bfloat16", 0.2), ("int8", 0.05)]
)
def test_greedy_ids_in_company_are_those_alone_where_the_best_is_clear(model, dtype, rounding):
    random_ = random.Random(9)
    sampling = Sampling(temperature=0, max_new_tokens=20, logprobs=2)
    requests = [Request(prompt(random_, 40), sampling=sampling) for _ in range(16)]
    together = generate(Engine(model, slots=8, dtype=dtype), requests)
    equal = 0
    for request, [company] in zip(requests, together, strict=True):
        [[alone]] = generate(Engine(model, slots=1, dtype=dtype), [request])
        equal += count_equal_greedy(alone, company, rounding)
    assert equal > 160


def test_candidates_wait_until_all_of_them_fit(model):
    engine = Engine(model, slots=4)
    engine.submit(Request([1], sampling=Sampling(max_new_tokens=4)))
    engine.step()
    engine.submit(Request([2], n=4))
    engine.submit(Request([3]))
    engine.step()
    assert (engine.live, engine.queued) == (1, 2)
    while engine.running[0].request_id == 1:
        engine.step()
    assert (engine.live, engine.queued) == (4, 1)


@pytest.mark.parametrize("candidate, left", [(None, 0), (1, 2)])
def test_cancelled_sequences_are_gone_by_the_next_step(model, candidate, left):
    engine = Engine(model, slots=4, prefill_chunk=4)
    for steps in range(4):  # cancelled in the queue, in its prefill, and live
        id_ = engine.submit(Request([1] * 7, n=3))
        for _ in range(steps):
            engine.step()
        engine.cancel(id_, candidate)
        assert {o.candidate for _ in range(3) for o in engine.step()} == ({0, 2} if left else set())
        assert engine.live == left
        engine.cancel(id_)
        engine.cancel(id_)
        engine.cancel(999)
        assert engine.idle


@pytest.mark.parametrize(
    "request_, reason",
    [
        (Request([]), "the prompt has 0 tokens, wanted from 1 to 63"),
        (
            Request([1] * 65, sampling=Sampling(max_new_tokens=0)),
            "the prompt has 65 tokens, wanted from 1 to 64",
        ),
        (Request([-1]), "id -1 is not in"),
        (Request([1, 2], [0]), "token_type_ids must be 2 numbers 0 or 1"),
        (Request([1], n=9), "n is 9, wanted from 1 to 8"),
        (Request([1], n=1.5), "n is 1.5, wanted from 1 to 8"),
        (Request([True]), "id True is no int"),
        (Request([1], stop_ids=(-1,)), f"stop id -1 is not in the vocabulary of {V}"),
        (
            Request([1], sampling=Sampling(logit_bias={3: 1, V: 1})),
            f"logit_bias of id {V} is not in the vocabulary of {V}",
        ),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_reason(model, request_, reason):
    engine = Engine(model)
    with pytest.raises(ValueError, match=reason):
        engine.submit(request_)
    assert engine.idle


def test_requests_with_and_without_types_are_not_mixed(model):
    engine = Engine(model)
    engine.submit(Request([1], [0]))
    with pytest.raises(ValueError, match="cannot share an engine"):
        engine.submit(Request([1]))


def test_types_for_a_model_without_type_rows_are_refused_and_leave_the_others_alone():
    engine = Engine(GPT2(dataclasses.replace(CONFIG, type_rows=NO_TYPE_ROWS)))
    with pytest.raises(ValueError, match="no rows for token types"):
        engine.submit(Request([1], [0]))
    [[answer]] = generate(engine, [Request([1], sampling=Sampling(max_new_tokens=3))])
    assert len(answer.ids) == 3


def test_a_shorter_engine_ends_at_its_length(model):
    [[answer]] = generate(
        Engine(model, length=10), [Request([1, 2, 3], sampling=Sampling(max_new_tokens=99))]
    )
    assert len(answer.ids) == 7 and answer[-1].finish_reason == "length"


class Script(torch.nn.Module):
    """A model whose best id is a given one at each position, and whose next best is `other`."""

    def __init__(self, vocab_size, ids, other):
        super().__init__()
        self.config = GPT2Config(
            vocab_size=vocab_size, n_positions=len(ids) + 1, n_embd=1, n_layer=1, n_head=1
        )
        self.wte, self.ln_f = torch.nn.Embedding(vocab_size, 1), torch.nn.LayerNorm(1)
        self.ids, self.other = ids, other

    kv_cache = GPT2.kv_cache

    def hidden(self, input_ids, token_type_ids=None, cache=None):
        return cache.position_ids[:, :, None]

    def logits(self, hidden):
        logits = torch.zeros(len(hidden), self.config.vocab_size)
        logits[:, self.other] = 1
        logits[range(len(hidden)), [self.ids[position] for position in hidden[:, 0].tolist()]] = 2
        return logits


def spellings(text):
    """A tokenizer of all parts of the text's bytes, and the ids of every way to cut the text."""
    data = text.encode()
    spell = {byte: character for character, byte in BYTE_OF.items()}
    parts = {data[i:j] for i in range(len(data)) for j in range(i + 2, len(data) + 1)}
    pieces = [*sorted(BYTE_OF), *("".join(spell[byte] for byte in part) for part in sorted(parts))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(backend)
    id_of = {part: i for i, part in enumerate(tokenizer.token_bytes)}
    ways = []
    for cuts in itertools.product([False, True], repeat=len(data) - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(data)]
        ways.append([id_of[data[i:j]] for i, j in itertools.pairwise(bounds)])
    return tokenizer, ways


def ends(tokenizer, ids, word):
    """How many of the ids it takes until the word stands in the text."""
    return next(n for n in range(len(ids) + 1) if word in tokenizer.decode(ids[:n]))


@pytest.mark.parametrize("text, word", [("a禁止b", "禁止"), ("ナナナ", "ナナ")])
def test_a_forbidden_word_is_never_completed_at_any_token_boundary(text, word):
    tokenizer, ways = spellings(text)
    other = tokenizer.encode("~")[0]
    for ids in ways:
        sampling = Sampling(
            temperature=0, max_new_tokens=len(ids), word_filter=WordFilter(tokenizer, [word])
        )
        engine = Engine(Script(tokenizer.vocab_size, ids, other), slots=1)
        [[answer]] = generate(engine, [Request([other], sampling=sampling)])
        n = ends(tokenizer, ids, word)
        assert answer.ids[:n] == [*ids[: n - 1], other]
        assert word not in tokenizer.decode(answer.ids)


@pytest.mark.parametrize(
    "text, stop",
    [("a止まれb", "止ま"), ("ab\n\nUser:", "\n\nUser")],
)
def test_a_stop_string_ends_the_stream_at_any_token_boundary(text, stop):
    tokenizer, ways = spellings(text)
    for ids in ways:
        engine = Engine(Script(tokenizer.vocab_size, ids, 0), slots=1)
        request = engine.submit(
            Request([0], sampling=Sampling(temperature=0, max_new_tokens=len(ids)))
        )
        decoder, said, tokens = StreamDecoder(tokenizer, [stop]), "", 0
        while not engine.idle:
            for output in engine.step():
                said, tokens = said + decoder.push(output.token), tokens + 1
                assert "\ufffd" not in said
                if decoder.stopped:
                    engine.cancel(request)
        assert said + decoder.finish() == text[: text.index(stop)] and tokens == ends(
            tokenizer, ids, stop
        )

"""A conversation's next turn starts from what is cached of it, and says what it would anyway."""

import random

import pytest
import torch
from hf_models import shake

from gptchat.inference.engine import Engine, Request, generate
from gptchat.inference.prefix_cache import NOTHING, Prefix, PrefixCache
from gptchat.inference.sampling import Sampling
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.model.kv_cache import KVCache

torch.set_num_threads(1)

V, LENGTH = 97, 64
ROUNDING = 1e-4  # of keys, values and log-probabilities in float32


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V, n_positions=LENGTH, n_embd=32, n_layer=3, n_head=4, type_rows=(1, 7)
    )
    model = GPT2(config)
    shake(model, 0)
    return model.eval()


def greedy(new=6, **settings):
    return Sampling(temperature=0, max_new_tokens=new, logprobs=2, **settings)


class Watched(Engine):
    """An engine that notes the passes it makes: how many tokens of each row are new."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.passes = []

    def _admit(self):
        group = super()._admit()
        if group:
            self.passes.append([len(one.next_chunk(self.prefill_chunk)[0]) for one in group])
        return group

    def answer(self, request):
        self.passes.clear()
        [candidates] = generate(self, [request])
        return candidates


# The slots


def small_cache(slots=4, enabled=True):
    """A cache whose positions hold the number of their slot."""
    cache = PrefixCache(
        KVCache(1, 1, 1, slots, 8, torch.float32, torch.device("cpu")), slots, enabled
    )
    for slot in range(slots):
        cache.cache.kv[:, :, slot] = slot
    return cache


def held(cache, slot, n):
    """The first positions of a slot."""
    return cache.cache.kv[0, 0, slot, 0, :n, 0].tolist()


def test_the_longest_beginning_of_ids_and_types_is_found_among_free_slots():
    cache = small_cache()
    cache.remember(0, [1, 2, 3, 4], [0, 0, 0, 0])
    cache.remember(1, [1, 2, 3], [0, 0, 1])
    cache.remember(2, [1, 2, 9], [0, 0, 0])
    cache.remember(3, [7], [0])
    assert cache.find(0, [1, 2, 3, 4, 5], [0] * 5) == Prefix(0, 4)
    assert cache.find(0, [1, 2, 3, 4, 5], [0, 0, 1, 1, 1]) == Prefix(1, 3)
    assert cache.find(1, [1, 2, 3, 4, 5], [0] * 5) == Prefix(1, 2)  # slot 0 is in use
    assert cache.find(0, [1, 2, 3, 4], [0] * 4) == Prefix(0, 3)  # the last id is computed
    assert cache.find(2, [8, 7], [0, 0]) == Prefix(2, 0)


def test_a_prompt_that_branches_off_gets_a_copy_in_the_slot_used_least_recently():
    cache = small_cache()
    for slot, ids in ((2, [8, 8]), (0, [1, 2, 3, 4]), (1, [5, 6]), (3, [7])):
        cache.remember(slot, ids, [])
    cache.take(0, cache.find(0, [1, 2, 9, 9], []))  # slot 2 was remembered first
    assert held(cache, 0, 2) == [0, 0] and cache.contents[0] == NOTHING
    assert held(cache, 2, 4) == [0, 0, 0, 0] and cache.contents[2].ids == [1, 2, 3, 4]
    assert [cache.contents[slot].ids for slot in (1, 3)] == [[5, 6], [7]]


def test_a_disabled_cache_remembers_nothing():
    cache = small_cache(enabled=False)
    cache.remember(3, [1, 2, 3], [])
    assert cache.find(0, [1, 2, 3, 4], []) == Prefix(0, 0)


# Conversations


def test_of_a_next_turn_only_the_new_message_is_computed(model):
    engine = Watched(model, slots=3, prefix_cache=True)
    ids, types = list(range(20, 40)), [0] * 19 + [1]
    for _ in range(3):
        [answer] = engine.answer(Request(ids, types, greedy()))
        ids, types = ids + answer.ids, types + [1] * len(answer.ids)
        ids, types = [*ids, 5, 6, 7], [*types, 0, 0, 1]
    # The answer's last token was drawn but never computed.
    assert engine.passes[0] == [4] and answer[0].n_cached == len(ids) - 3 - 6 - 4
    [again] = engine.answer(Request(ids, types, greedy()))
    [alone] = generate(Engine(model), [Request(ids, types, greedy())])[0]
    assert again.ids == alone.ids and alone[0].n_cached == 0


def test_other_types_a_new_beginning_or_a_dropped_turn_share_nothing(model):
    engine = Watched(model, slots=3, prefix_cache=True)
    ids = list(range(20, 40))
    engine.answer(Request(ids, [0] * 20, greedy()))
    for request in (
        Request(ids, [1] * 20, greedy()),
        Request([1, *ids], [0] * 21, greedy()),
        Request(ids[5:], [0] * 15, greedy()),
    ):
        engine.answer(request)
        assert engine.passes[0] == [len(request.input_ids)]


def test_a_regenerated_answer_computes_one_token_and_leaves_the_other_branch(model):
    engine = Watched(model, slots=4, prefix_cache=True)
    ids = list(range(20, 40))
    first, second = (
        engine.answer(Request(ids, sampling=Sampling(max_new_tokens=6, seed=seed)))[0]
        for seed in (1, 2)
    )
    assert engine.passes[0] == [1] and first.ids != second.ids
    for answer in (first, second):
        engine.answer(Request([*ids, *answer.ids, 5], sampling=greedy(1)))
        assert engine.passes[0] == [2]


def test_a_scored_prompt_is_computed_at_every_position(model):
    engine = Watched(model, prefix_cache=True)
    ids = list(range(20, 40))
    for _ in range(2):
        request = Request(ids, sampling=greedy(1), score_prompt=True)
        [answer] = engine.answer(request)
        assert engine.passes[0] == [20] and len(answer[0].prompt_logprobs) == 20


def test_a_long_prompt_that_is_cancelled_is_continued(model):
    engine = Watched(model, slots=2, prefill_chunk=8, prefix_cache=True)
    ids = list(range(30))
    cancelled = engine.submit(Request(ids, sampling=greedy()))
    engine.step()
    engine.step()
    engine.cancel(cancelled)
    assert engine.idle
    [answer] = engine.answer(Request(ids, sampling=greedy()))
    assert engine.passes[:2] == [[8], [6]] and answer[0].n_cached == 16
    [alone] = generate(Engine(model), [Request(ids, sampling=greedy())])[0]
    assert answer.ids == alone.ids


def test_prompts_that_start_at_different_positions_are_prefilled_together_if_they_fit(model):
    engine = Watched(model, slots=4, prefix_cache=True)
    long, short = [1] * 50, [2] * 10
    engine.answer(Request(long, sampling=greedy(1)))
    requests = [Request([*long, 3], sampling=greedy()), Request(short, sampling=greedy())]
    engine.passes.clear()
    together = generate(engine, requests)
    assert engine.passes[0] == [1, 10]
    engine.answer(Request(long, sampling=greedy(1)))
    requests[1] = Request([4] * 15, sampling=greedy())  # 50 + 15 positions: more than there are
    engine.passes.clear()
    apart = generate(engine, requests)
    assert engine.passes[0] == [1] and [15] in engine.passes[1:3]
    for request, [answer] in zip(requests, apart, strict=True):
        assert answer.ids == generate(Engine(model), [request])[0][0].ids
    assert apart[0][0].ids == together[0][0].ids


# Traffic


class Talk:
    """Conversations that go on, branch, end and are cancelled at random times in few slots."""

    def __init__(self, model, n_conversations, **settings):
        self.model = model
        self.random = random.Random(n_conversations)
        self.engine = Engine(model, prefix_cache=True, dtype="float32", **settings)
        self.turns = [self.opening() for _ in range(n_conversations)]  # ids and types of each
        self.asked = {}  # request id -> (number of the conversation, request)
        self.answers = {}  # (request id, candidate) -> outputs
        self.finished = []  # (request, its candidates' outputs), in the order in which they ended
        self.n_cached = 0

    def opening(self):
        """The beginning of a conversation; half of them begin alike."""
        system = [11, 12, 13, 14, 15, 16] if self.random.random() < 0.5 else []
        ids = system + self.message()
        return ids, [0] * (len(ids) - 1) + [1]

    def message(self):
        return [self.random.randrange(V) for _ in range(self.random.randint(1, 14))]

    def ask(self):
        number = self.random.randrange(len(self.turns))
        if number in [asked for asked, _ in self.asked.values()]:
            return
        ids, types = self.turns[number]
        sampling = greedy(self.random.choice([0, 1, 4, 9]))
        request = Request(ids, types, sampling, self.random.choice([1, 1, 1, 2, 3]), (4, 5))
        self.asked[self.engine.submit(request)] = number, request

    def take(self, output):
        self.answers.setdefault((output.request_id, output.candidate), []).append(output)
        self.n_cached += output.n_cached
        number, request = self.asked[output.request_id]
        candidates = [self.answers.get((output.request_id, i), []) for i in range(request.n)]
        if all(outputs and outputs[-1].finish_reason for outputs in candidates):
            del self.asked[output.request_id]
            self.finished.append((request, candidates))
            self.reply(number, request, self.random.choice(candidates))

    def reply(self, number, request, outputs):
        """Go on after an answer, regenerate it, or begin anew."""
        answer = [output.token for output in outputs if output.token is not None]
        message = self.message()
        ids = [*request.input_ids, *answer, *message]
        types = [*request.token_type_ids, *[1] * len(answer), *[0] * (len(message) - 1), 1]
        if len(ids) >= LENGTH or self.random.random() < 0.1:
            self.turns[number] = self.opening()
        elif self.random.random() < 0.8:
            self.turns[number] = ids, types

    def run(self, n_steps):
        for step in range(n_steps):
            for _ in range(self.random.choice([0, 1, 1, 3])):
                self.ask()
            if self.asked and self.random.random() < 0.05:
                id = self.random.choice(list(self.asked))
                self.engine.cancel(id)
                del self.asked[id]
            for output in self.engine.step():
                self.take(output)
            if step % 10 == 0:
                self.check_cache()
        return self

    def check_cache(self):
        """Every slot holds the keys and values of what it is said to hold."""
        engine = self.engine
        contents = {slot: row.cached for slot, row in enumerate(engine.running)}
        for slot in contents:
            assert engine.prefix_cache.contents[slot] == NOTHING
        if engine.waiting and engine.waiting[0].n_prefilled:
            partial = engine.waiting[0]
            n = partial.n_prefilled
            request = partial.request
            contents[len(engine.running)] = request.input_ids[:n], request.token_type_ids[:n]
        for slot in range(len(contents), engine.slots):
            remembered = engine.prefix_cache.contents[slot]
            contents[slot] = remembered.ids, remembered.types
        for slot, (ids, types) in contents.items():
            if ids:
                fresh = fresh_cache(self.model, ids, types)
                cached = engine.cache.kv[:, :, slot, :, : len(ids)]
                torch.testing.assert_close(cached, fresh, atol=ROUNDING, rtol=ROUNDING)


@torch.inference_mode()
def fresh_cache(model, ids, types):
    """Keys and values of ids, by one pass of the model."""
    cache = model.kv_cache(1, LENGTH, torch.float32)
    view = cache.view(0, torch.tensor([0]), len(ids), len(ids))
    model.hidden(torch.tensor([ids]), torch.tensor([types]), cache=view)
    return cache.kv[:, :, 0, :, : len(ids)]


@pytest.mark.parametrize(
    "n_conversations, slots, chunk, n_steps", [(6, 4, 256, 200), (3, 5, 5, 300), (6, 8, 24, 150)]
)
def test_interleaved_conversations_answer_as_without_the_cache(
    model, n_conversations, slots, chunk, n_steps
):
    talk = Talk(model, n_conversations, slots=slots, prefill_chunk=chunk).run(n_steps)
    alone = Engine(model, slots=slots, dtype="float32")
    n_equal = 0
    for request, candidates in talk.finished:
        [wanted] = generate(alone, [request])
        for outputs, expected in zip(candidates, wanted, strict=True):
            for got, other in zip(outputs, expected, strict=False):
                if got.token != other.token:
                    best, second = (logprob for _, logprob in other.scored.top)
                    assert best - second < ROUNDING
                    break
                if other.token is not None:
                    assert got.scored.logprob == pytest.approx(other.scored.logprob, abs=ROUNDING)
                n_equal += 1
    n_prompt = sum(len(request.input_ids) for request, _ in talk.finished)
    print(f"{len(talk.finished)} requests, {talk.n_cached} of {n_prompt} tokens cached")
    assert len(talk.finished) > 30 and n_equal > 150
    assert talk.n_cached > 0.15 * n_prompt

"""Each setting means what it means in transformers, and draws follow the distribution alone."""

import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from gptchat.inference.blocks import ONE, best, block_sums, draw_place
from gptchat.inference.draw import Draw, Row, distribution, heavier, score, uniform, weigh
from gptchat.inference.sampling import Sampling
from gptchat.settings import declared
from tests.hf_models import BadWords

V = 301


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def some_logits(rows, seed=0, scale=3.0, size=V):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * scale


def draw(logits, rows, suppress=()):
    return Draw(rows, torch.tensor(suppress, dtype=torch.int64))(logits)[0]


def drawn_ids(logits, rows, suppress=()):
    return [drawn.token for drawn in draw(logits, rows, suppress)]


def row(ids=(1, 2, 3), candidate=0, n_prompt=0, stop_ids=(), **settings):
    return Row(Sampling(**settings), candidate, list(ids), n_prompt, stop_ids)


# What is drawn from, beside transformers


CUTS = [  # settings that leave ids out by their weight
    {"temperature": 0.3},
    {"temperature": 1.9},
    *({"top_k": k} for k in (1, 50, V, 9999)),
    *({"top_p": p} for p in (0.0, 0.01, 0.5, 0.999)),
    *({"min_p": p} for p in (0.01, 1.0)),
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 1.5, "top_k": 7, "top_p": 0.6},
    {"temperature": 2.5, "top_p": 0.95, "min_p": 0.02},
]
IDS = [20, 9, 20, 300, 7, 8]  # of which 4 are the prompt
PENALTIES = [
    {"repetition_penalty": 0.5},
    {"repetition_penalty": 1.3},
    {"word_filter": BadWords([[4], [7, 8, 2], [8, 3], [9, 1, 5]])},
    {"logit_bias": {4: 2.5, 300: -100, 17: 100}},
    {"min_tokens": 2},
    {"min_tokens": 3},
]


def chain(logits, row, suppress):
    """The probabilities by transformers' processors."""
    s = row.sampling
    processors = [
        theirs.RepetitionPenaltyLogitsProcessor(s.repetition_penalty),
        theirs.SuppressTokensLogitsProcessor(list(suppress)),
        theirs.MinNewTokensLengthLogitsProcessor(row.n_prompt, s.min_tokens, list(row.stop_ids)),
        theirs.TemperatureLogitsWarper(s.temperature),
    ]
    if s.logit_bias:
        biases = {(id,): float(bias) for id, bias in s.logit_bias.items()}
        processors.insert(0, theirs.SequenceBiasLogitsProcessor(biases))
    if s.word_filter:
        processors.insert(0, theirs.NoBadWordsLogitsProcessor(s.word_filter.words))
    processors += [theirs.TopKLogitsWarper(s.top_k)] if s.top_k else []
    processors += [theirs.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    processors += [theirs.MinPLogitsWarper(s.min_p)] if s.min_p else []
    scores = logits.double()[None]
    for processor in processors:
        scores = processor(torch.tensor([row.ids]), scores)
    return scores[0].softmax(-1)


@pytest.mark.parametrize("settings", [*CUTS, *PENALTIES, PENALTIES[1] | PENALTIES[2] | CUTS[-1]])
def test_the_distribution_is_that_of_transformers(settings):
    for seed, suppress in ((0, (0,)), (1, (0, 17, 300))):
        logits = some_logits(1, seed)[0]
        one = row(IDS, n_prompt=4, stop_ids=(3, 5), **settings)
        wanted = chain(logits, one, suppress)
        torch.testing.assert_close(distribution(logits, one, suppress), wanted)


def test_frequency_and_presence_penalty_are_openais_formula_over_the_answer_alone():
    """mu[j] - c[j] * alpha_frequency - (c[j] > 0) * alpha_presence"""
    logits = some_logits(1)[0]
    for frequency, presence in ((0.7, 0), (0, 1.5), (-2, 0.25)):
        penalties = {"frequency_penalty": frequency, "presence_penalty": presence}
        scores = logits.double()
        scores[9] -= 2 * frequency + presence
        scores[7] -= frequency + presence
        found = distribution(logits, row([5, 9, 7, 9, 9], n_prompt=2, **penalties))
        torch.testing.assert_close(found, scores.softmax(-1))


# The fast draw, beside the distribution

SETTINGS = [
    {},
    {"temperature": 0.7, "top_k": 12},
    {"temperature": 0.6, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.15},
    {"top_k": 12, "top_p": 0.5, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    {"top_k": 12, "min_p": 0.2, "top_p": 0.9},
    {"temperature": 1.4, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
    {"top_p": 0.2},  # most are drawn several times
    {"top_p": 0.0, "top_k": 5},
    {"min_p": 0.4, "logit_bias": {9: 2.0, 5: -1.0}, "word_filter": BadWords([[2, 3], [1]])},
    {"temperature": 0, "repetition_penalty": 5.0, "min_tokens": 9},
]


@pytest.mark.parametrize("size", [40, 800])  # less than a block of `blocks`, and some of them
@pytest.mark.parametrize("settings", SETTINGS)
def test_drawn_tokens_follow_the_distribution(size, settings):
    """Chi-square over 20,000 draws at fixed seeds, all rows together."""
    logits = some_logits(1, seed=2, scale=1.5, size=size)
    logits[0, 1:10] = 0.13 * torch.arange(1, 10) + logits.max()  # what the settings name is likely
    ids = [5, 9, 9, 2, 7, 9, 2]
    rows = [
        row(ids, n_prompt=2, stop_ids=(4, 8), candidate=i, seed=11, **settings)
        for i in range(20_000)
    ]
    expected = distribution(logits[0], rows[0], suppress=(0, 6))
    drawn = torch.tensor(drawn_ids(logits.repeat(len(rows), 1), rows, (0, 6)))
    counts = drawn.bincount(minlength=size)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    expected = expected[kept] * len(rows)
    statistic = ((counts[kept] - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    assert abs(statistic - freedom) <= 4 * math.sqrt(2 * freedom), (statistic, freedom)


@pytest.mark.parametrize("settings", SETTINGS)
def test_everything_heavier_than_an_id_that_may_be_drawn_may_be_drawn(settings):
    """The invariant of the cut, which redraws among what is heavier."""
    uncut = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    logits = some_logits(1, seed=4)[0]
    if settings.get("temperature") != 0:
        kept = distribution(logits, row(IDS, n_prompt=4, **settings)) > 0
        weights = distribution(logits, row(IDS, n_prompt=4, **settings | uncut))
        assert kept.all() or weights[kept].min() >= weights[~kept].max()


@pytest.mark.parametrize("size", [V, 50_257])
def test_a_draw_does_not_depend_on_the_other_rows(size):
    torch.set_num_threads(2)
    settings = [*SETTINGS, *CUTS]
    logits = some_logits(len(settings), seed=3, size=size)
    rows = [row(range(1, i + 2), i % 3, n_prompt=1, **s) for i, s in enumerate(settings)]
    together = drawn_ids(logits.clone(), rows)
    alone = [drawn_ids(logits[i : i + 1].clone(), [rows[i]])[0] for i in range(len(rows))]
    assert together == alone


def test_a_draw_is_used_again_while_ids_grow():
    rows = [row((1, 2), seed=i, n_prompt=1, **s) for i, s in enumerate(SETTINGS)]
    again = Draw(rows, torch.tensor([0]))
    for step in range(3):
        logits = some_logits(len(rows), seed=step)
        wanted = drawn_ids(logits.clone(), rows, (0,))
        tokens = [drawn.token for drawn in again(logits)[0]]
        assert tokens == wanted
        for one, token in zip(rows, tokens, strict=True):
            one.ids.append(token)


def test_noise_of_neighbouring_places_is_uniform_and_uncorrelated():
    noise = torch.tensor(
        [[[uniform(s, c, p) for p in range(30)] for c in range(10)] for s in range(30)]
    )
    assert 0 <= noise.min() and noise.max() < 1
    counts = (noise.flatten() * 20).long().bincount(minlength=20)
    assert ((counts - 450.0) ** 2 / 450).sum() < 19 + 4 * math.sqrt(38)
    centred = noise - 0.5
    for axis in range(3):
        size = noise.shape[axis]
        product = (
            centred.narrow(axis, 0, size - 1) * centred.narrow(axis, 1, size - 1)
        ).flatten() * 12
        assert abs(product.mean()) < 4 / math.sqrt(product.numel())


def test_seed_candidate_and_position_each_change_the_draw():
    logits = some_logits(1, scale=0.1)

    def drawn(ids=10, candidate=0, seed=0):
        return draw(logits.clone(), [row(range(ids), candidate, seed=seed)])[0].token

    assert drawn() == drawn()
    others = [drawn(ids=11), drawn(candidate=1), drawn(seed=1), drawn(seed=-1), drawn(seed=2**70)]
    assert len({drawn(), *others}) == 6


@pytest.mark.parametrize("settings", [{}, {"top_k": 40_000}, {"top_k": 40_000, "top_p": 0.999}])
@pytest.mark.parametrize("noise", [0.0, 1 - 2.0**-52])
def test_an_id_without_probability_is_never_drawn(monkeypatch, noise, settings):
    """At both ends of the noise, with totals that float64 rounds up and down."""
    monkeypatch.setattr("gptchat.inference.draw.uniform", lambda *_: noise)
    for seed, size in ((0, 3), (1, 2_000), (2, 29_000)):
        logits = torch.full((1, 50_000), -1e9)
        logits[0, 20_000 : 20_000 + size] = some_logits(1, seed, size=size, scale=0.01)[0]
        [token] = drawn_ids(logits, [row(**settings)], suppress=(20_000, 19_999 + size))
        assert 20_000 < token < 19_999 + size


def test_greedy_takes_the_first_of_the_best_that_are_left():
    logits = some_logits(2)
    order = logits.argsort(-1, descending=True)
    without_the_best = BadWords([[order[1, 0].item()]])
    rows = [row(temperature=0), row(temperature=0, word_filter=without_the_best)]
    assert drawn_ids(logits, rows) == [order[0, 0], order[1, 1]]
    assert drawn_ids(torch.zeros(9, V), [row(temperature=0, seed=i) for i in range(9)]) == [0] * 9
    vanishing = [row(temperature=1e-300, seed=i) for i in range(2)]
    assert drawn_ids(some_logits(2), vanishing) == order[:, 0].tolist()


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 9, "top_p": 0.9}]
)
@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_nothing_to_draw_is_said_and_leaves_the_neighbours_alone(settings, bad):
    logits = some_logits(3, size=4096)
    logits[1] = bad
    rows = [row(seed=seed, top_p=0.9) for seed in range(3)]
    rows[1] = row(**settings)
    wanted = [drawn_ids(logits[i : i + 1].clone(), [rows[i]])[0] for i in (0, 2)]
    assert drawn_ids(logits, rows) == [wanted[0], -1, wanted[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_the_models_before_any_setting(dtype):
    logits = some_logits(3).to(dtype)
    wanted = logits.float().log_softmax(-1)
    rows = [
        row(logprobs=3, temperature=0.5, repetition_penalty=2.0),
        row(),
        row(logprobs=0, temperature=0),
    ]
    drawn = draw(logits.clone(), rows, suppress=tuple(range(100)))
    assert drawn[1].logprob is None and drawn[1].top == ()
    assert [len(d.top) for d in drawn] == [3, 0, 0]
    for i in (0, 2):
        assert drawn[i].logprob == pytest.approx(wanted[i, drawn[i].token].item(), abs=1e-5)
    best = wanted[0].topk(3)
    assert [token for token, _ in drawn[0].top] == best.indices.tolist()
    assert [p for _, p in drawn[0].top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_score_lists_at_most_the_vocabulary():
    scored = score(some_logits(2, size=4), torch.tensor([1, 2]), k=10)
    assert [len(s.top) for s in scored] == [4, 4] and [s.token for s in scored] == [1, 2]
    assert sum(math.exp(p) for _, p in scored[0].top) == pytest.approx(1)


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("size", [45, 300, 50_257])
def test_equal_scores_have_equal_weights_wherever_they_stand(size, n_threads):
    """Also at the end of a tensor, or of a thread's part, where vectors are not full."""
    torch.set_num_threads(n_threads)
    for other in torch.linspace(-8, -0.01, 30):
        scores = torch.full((3, size), other.item())
        scores[:, 0] = 0
        weights = weigh(scores, torch.zeros(3, 1), torch.ones(3, 1))
        assert len(weights[:, 1:].unique()) == 1


# Blocks


@st.composite
def rows_of_scores(draw):
    """Scores (R, K) of rows that are flat, peaked, tied, all equal or nearly all forbidden."""
    size = draw(st.sampled_from([1, 2, 700, 5000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows = []
    for kind in draw(st.lists(st.sampled_from(["random", "tied", "equal", "few"]), min_size=1)):
        one = torch.randn(size, generator=generator) * draw(st.sampled_from([1e-6, 0.5, 4.0, 40.0]))
        if kind == "tied":
            one = one.round()
        elif kind == "equal":
            one = torch.zeros(size)
        elif kind == "few":
            one[torch.rand(size, generator=generator) < 0.99] = -math.inf
            one[0] = 0.0
        rows.append(one - one.max())
    return torch.stack(rows)


@hypothesis.settings(max_examples=100, deadline=None)
@given(rows_of_scores(), st.data())
def test_top_p_is_what_going_through_a_row_id_by_id_finds(scores, data):
    """At a place of each row: all that is heavier, summed in float64, which rounds otherwise."""
    shares = st.sampled_from([0.0, 1e-17, 1e-9, 0.3, 0.9, 0.95, 0.999999])
    top_p = torch.tensor([[data.draw(shares)] for _ in scores], dtype=torch.float64)
    size = scores.shape[1]
    places = torch.tensor([[data.draw(st.integers(0, size - 1))] for _ in scores])
    weights = scores.exp()
    above, _, is_outside = heavier(weights, places, top_p * block_sums(weights).sum(-1, True))
    own = weights.gather(1, places)
    assert torch.equal(above, torch.where(weights > own, weights, 0))
    sums = above.double().sum(-1, keepdim=True)
    limit = top_p * weights.double().sum(-1, keepdim=True)
    clear = (sums - limit).abs() > 1e-6
    assert torch.equal(is_outside[clear], (sums > limit)[clear])
    assert not is_outside[own == weights.amax(-1, keepdim=True)].any()


@hypothesis.settings(max_examples=100, deadline=None)
@given(rows_of_scores(), st.floats(0, 1 - 2**-52))
def test_the_best_and_a_drawn_place_of_blocks_are_those_of_the_whole_row(scores, noise):
    assert torch.equal(best(scores), scores.max(-1, keepdim=True).indices)
    weights = scores.exp()
    sums = block_sums(weights)
    numbers = torch.full((len(weights), 1), noise, dtype=torch.float64)
    places = draw_place(weights, sums, numbers)
    own = weights.gather(1, places)
    cumulative = weights.double().cumsum(-1)
    after = cumulative.gather(1, places) / cumulative[:, -1:]
    assert (own > 0).all()
    assert (after - own <= noise + 1e-6).all() and (after >= noise - 1e-6).all()
    total = sums.sum(-1, keepdim=True)
    torch.testing.assert_close(total.double() / ONE, cumulative[:, -1:], atol=1e-9, rtol=1e-6)


def test_in_a_block_of_rare_ids_one_without_weight_is_not_drawn():
    weights = torch.zeros(1, 512)
    weights[0, 0] = 1
    weights[0, 256:500] = 2.0**-41  # together more than a ONEth
    noise = torch.tensor([[1 - 2.0**-52]], dtype=torch.float64)
    assert draw_place(weights, block_sums(weights), noise).item() == 499


# Settings


@pytest.mark.parametrize(
    "bias, reason",
    [
        ({5: 101}, "logit_bias of 5: found 101; wanted a number, -100 to 100"),
        ({5: "1"}, "logit_bias of 5: found '1'; wanted a number"),
        ({"5": 1}, "logit_bias of '5': found '5'; wanted an integer, at least 0"),
    ],
)
def test_a_bias_that_is_none_is_refused(bias, reason):
    with pytest.raises(ValueError, match=reason):
        Sampling(logit_bias=bias)


@pytest.mark.parametrize("name", declared(Sampling))
def test_each_setting_is_checked_by_its_declaration(name):
    one = declared(Sampling)[name]
    assert one.help
    one.check(one.default)
    below = one.rules.get("min", 0) - 1
    above = one.rules.get("max", 0) + 1
    for wrong, is_wrong in ((below, "min" in one.rules), (above, "max" in one.rules)):
        if is_wrong:
            with pytest.raises(ValueError, match=f"^{name}: found {wrong}; wanted {one.wanted}$"):
                Sampling(**{name: wrong})
    for wrong in (True, "1", math.nan, [1], *([1.5, np.int64(1)] if one.type is int else [])):
        with pytest.raises(ValueError, match=f"^{name}: found .*; wanted "):
            Sampling(**{name: wrong})

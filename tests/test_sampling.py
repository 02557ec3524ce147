"""Each setting means what it means in transformers, and draws follow the distribution alone."""

import itertools
import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from gptchat.inference import draw as drawing
from gptchat.inference import sampling
from gptchat.inference.blocks import ONE, best, block_sums, draw_place
from gptchat.inference.draw import Row, drop_below_min_p, heavier, score, uniform, weigh
from gptchat.inference.sampling import Sampling
from gptchat.settings import declared
from tests.hf_models import BadWords

V = 301
TINY = 1e-11  # ours hardly ever draws what is less than 2**-34, which is 6e-11


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def some_logits(rows, seed=0, scale=3.0, size=V):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * scale


def draw(logits, rows, suppress=()):
    return drawing.draw(logits, rows, torch.tensor(suppress, dtype=torch.int64))


def process(scores, rows, suppress=()):
    """What the settings change before a draw, in place."""
    drawing.penalize_and_ban(scores, rows, torch.tensor(suppress, dtype=torch.int64))


def row(ids=(1, 2, 3), candidate=0, n_prompt=0, stop_ids=(), **settings):
    sampling = Sampling(**settings)
    return Row(sampling, candidate, list(ids), n_prompt=n_prompt, stop_ids=stop_ids)


def outside_top_p(weights, limit):
    """Of each place of a row of weights (K,) whether what is heavier reaches a limit (1,)."""
    rows = weights.expand(len(weights), -1)
    places = torch.arange(len(weights))[:, None]
    return heavier(rows, places, limit)[-1][:, 0]


def probabilities_and_sum(scores, settings):
    """What is drawn from before top-p, and the sum of which top-p is a share."""
    weights = weigh(scores, scores.amax(-1, keepdim=True), settings)
    total = block_sums(weights).sum(-1, keepdim=True)
    drop_below_min_p(weights, settings)
    return weights, total


def ours(logits, settings):
    """The ids that may be drawn, and their probabilities, by our sampler."""
    all_weights = torch.zeros(logits.shape)
    for i, s in enumerate(settings):
        best = logits[i : i + 1].topk(min(s.top_k or logits.shape[1], logits.shape[1]))
        (weights,), (total,) = probabilities_and_sum(best.values, [s])
        if s.top_p < 1:
            weights[outside_top_p(weights, s.top_p * total)] = 0
        all_weights[i, best.indices[0]] = weights
    return all_weights > 0, all_weights / all_weights.sum(-1, keepdim=True)


def chain(logits, settings):
    """The same by transformers' warpers, one row at a time."""
    scores = []
    for one, s in zip(logits, settings, strict=True):
        warpers = [theirs.TemperatureLogitsWarper(s.temperature)]
        warpers += [theirs.TopKLogitsWarper(s.top_k)] if s.top_k else []
        warpers += [theirs.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
        warpers += [theirs.MinPLogitsWarper(s.min_p)] if s.min_p else []
        one = one[None]
        for warper in warpers:
            one = warper(None, one)
        scores.append(one)
    probabilities = torch.cat(scores).softmax(-1)
    return probabilities > 0, probabilities


def assert_same(logits, settings):
    (kept, probabilities), (kept_there, probabilities_there) = (
        ours(logits, settings),
        chain(logits, settings),
    )
    assert not (kept & ~kept_there).any()
    assert not (kept_there & ~kept & (probabilities_there > TINY)).any()
    torch.testing.assert_close(probabilities.float(), probabilities_there, rtol=1e-4, atol=TINY)


SETTINGS = [
    *(Sampling(temperature=t) for t in (0.3, 0.7, 1.0, 1.9)),
    *(Sampling(top_k=k) for k in (1, 2, 50, V, 9999)),
    *(Sampling(top_p=p) for p in (0.0, 0.01, 0.5, 0.9, 0.999)),
    *(Sampling(min_p=p) for p in (0.01, 0.2, 1.0)),
    Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05),
    Sampling(temperature=1.5, top_k=7, top_p=0.6),
    Sampling(temperature=2.5, top_p=0.95, min_p=0.02),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_temperature_and_cutoffs_equal_transformers(settings):
    assert_same(some_logits(64), [settings] * 64)


def test_rows_of_different_settings_do_not_mix():
    assert_same(some_logits(len(SETTINGS), seed=5), SETTINGS)


@pytest.mark.parametrize("scale", [0.05, 0.5, 4.0])  # nuclei of thousands, hundreds and a few ids
@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.97])
def test_a_wide_nucleus_ends_at_the_same_id_in_a_large_vocabulary(scale, top_p):
    logits = some_logits(1, seed=1, scale=scale, size=20_000)
    # Summed in float32 theirs is off by some ids of 20,000.
    n_kept = chain(logits.double(), [Sampling(top_p=top_p)])[0].sum()
    weights, total = probabilities_and_sum(logits.clone(), [Sampling()])
    last_in, first_out = logits.argsort(descending=True)[0, n_kept - 1 : n_kept + 1].tolist()
    rows, places = weights.expand(2, -1), torch.tensor([[last_in], [first_out]])
    assert heavier(rows, places, top_p * total)[-1][:, 0].tolist() == [False, True]


def test_repetition_penalty_equals_transformers():
    logits, ids = some_logits(3), torch.tensor([[5, 9, 5, 300], [0, 1, 2, 3], [7, 7, 7, 7]])
    for penalty in (0.5, 1.0, 1.3):
        wanted = theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        scores = logits.clone()
        process(scores, [row(i, repetition_penalty=penalty) for i in ids.tolist()], ())
        torch.testing.assert_close(scores, wanted)


def test_bad_words_and_suppressed_ids_equal_transformers():
    logits, words = some_logits(3), [[4], [1, 2], [1, 3], [9, 1, 5], [8, 8, 8, 8]]
    ids = torch.tensor([[0, 9, 1], [1, 1, 9], [8, 8, 8]])
    wanted = theirs.NoBadWordsLogitsProcessor(words)(ids, logits.clone())
    wanted = theirs.SuppressTokensLogitsProcessor([0, 300])(ids, wanted)
    scores = logits.clone()
    process(scores, [row(i, word_filter=BadWords(words)) for i in ids.tolist()], (0, 300))
    assert torch.equal(scores, wanted)
    assert wanted.isinf().sum() == 3 * 3 + 3 + 1  # every kind has met a row


def test_frequency_and_presence_penalty_are_openais_formula_over_the_answer_alone():
    """mu[j] - c[j] * alpha_frequency - (c[j] > 0) * alpha_presence, counted one id at a time."""
    logits = some_logits(4)
    prompt = [5, 9, 9, 300]
    answers = [[], [7], [9, 7, 9, 9, 0], list(range(50)) * 3]
    for frequency, presence in ((0.7, 0), (0, 1.5), (-2, 0.25), (2, -2)):
        wanted = logits.double()
        for scores, answer in zip(wanted, answers, strict=True):
            for id in range(V):
                times = sum(1 for said in answer if said == id)
                scores[id] -= times * frequency + (times > 0) * presence
        rows = [
            row(
                prompt + answer,
                n_prompt=len(prompt),
                frequency_penalty=frequency,
                presence_penalty=presence,
            )
            for answer in answers
        ]
        scores = logits.clone()
        process(scores, rows)
        torch.testing.assert_close(scores.double(), wanted, rtol=1e-6, atol=1e-5)
        assert torch.equal(scores[0], logits[0])  # of the prompt's ids nothing is taken


def test_logit_bias_equals_transformers_and_revives_no_suppressed_id():
    logits = some_logits(2)
    bias = {4: 2.5, 300: -100, 17: 100}
    processor = theirs.SequenceBiasLogitsProcessor({(id,): float(b) for id, b in bias.items()})
    wanted = processor(torch.tensor([[1, 2, 3]]), logits[:1].clone())
    scores = logits.clone()
    process(scores, [row(logit_bias=bias), row()], suppress=(17,))
    wanted[0, 17] = logits[1, 17] = -math.inf
    assert torch.equal(scores, torch.cat([wanted, logits[1:]]))
    best = logits[1].argmax().item()
    banned = {id: -100 for id in range(V) if id not in (17, best)}
    drawn = draw(some_logits(2), [row(logit_bias={6: 100}, seed=1), row(logit_bias=banned)])
    assert [d.token for d in drawn] == [6, best]


@pytest.mark.parametrize("n_answered", range(4))
def test_min_tokens_equals_transformers(n_answered):
    logits, stop_ids = some_logits(1), (3, 8)
    ids = list(range(20, 25 + n_answered))
    processor = theirs.MinNewTokensLengthLogitsProcessor(5, 3, list(stop_ids))
    wanted = processor(torch.tensor([ids]), logits.clone())
    scores = logits.clone()
    process(scores, [row(ids, n_prompt=5, stop_ids=stop_ids, min_tokens=3)])
    assert torch.equal(scores, wanted)
    assert wanted[0, list(stop_ids)].isinf().all() == (n_answered < 3)


def test_a_row_with_every_penalty_disturbs_no_neighbour():
    logits = some_logits(3, seed=4)
    busy = row(
        (1, 2, 2),
        n_prompt=1,
        stop_ids=(4,),
        repetition_penalty=1.3,
        frequency_penalty=1,
        presence_penalty=1,
        logit_bias={2: 0.5, 6: -3},
        min_tokens=9,
    )
    together = logits.clone()
    process(together, [row(), busy, row()])
    alone = logits[1:2].clone()
    process(alone, [busy])
    assert torch.equal(together[[0, 2]], logits[[0, 2]]) and torch.equal(together[1:2], alone)
    # The order of the rules: the repetition penalty comes between the bias and the other penalties.
    biased = logits[1, 2].item() + 0.5
    penalized = biased * 1.3 if biased < 0 else biased / 1.3
    assert together[1, 2].item() == pytest.approx(penalized - 3)


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


def test_biases_are_read_from_text():
    assert sampling.parse_biases(["5=-2.5", "", "0=100"], 10) == {5: -2.5, 0: 100}
    for text in ("5", "5=", "=3", "x=3", "-1=3", "10=3", "5=a", "5:3"):
        with pytest.raises(ValueError, match=f"logit_bias {text}: wanted ID=BIAS"):
            sampling.parse_biases([text], 10)


def test_word_filter_forbids_what_it_names():
    class Echo:
        def banned(self, ids):
            return [ids[-1]]

    scores = some_logits(2)
    process(scores, [row((3, 7), word_filter=Echo()), row((3, 7))], ())
    assert scores.isinf().nonzero().tolist() == [[0, 7]]


@pytest.mark.parametrize("size", [40, 800])  # less than a block of `blocks`, and some of them
def test_drawn_tokens_follow_the_distribution(size):
    """Chi-square over 20,000 draws of each row of settings, at fixed seeds."""
    logits = some_logits(1, seed=2, scale=1.5, size=size)
    for settings in (
        {},
        {"temperature": 0.7, "top_k": 12},
        {"temperature": 0.6, "top_k": 40, "top_p": 0.95},
        {"top_k": 12, "top_p": 0.5},
        {"top_k": 12, "min_p": 0.2},
        {"temperature": 1.4, "top_p": 0.8, "min_p": 0.05},
        {"top_p": 0.2},  # most are drawn several times
        {"min_p": 0.4},
    ):
        expected = chain(logits, [Sampling(**settings)])[1][0].double()
        rows = [row(range(i % 50), i // 50, seed=11, **settings) for i in range(20_000)]
        drawn = torch.tensor([d.token for d in draw(logits.repeat(len(rows), 1), rows)])
        counts = drawn.bincount(minlength=size)
        assert counts[expected == 0].sum() == 0
        kept = expected > 0
        expected = expected[kept] * len(rows)
        statistic = ((counts[kept] - expected) ** 2 / expected).sum().item()
        freedom = len(expected) - 1
        assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom), (settings, statistic, freedom)


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


@pytest.mark.parametrize("size", [V, 50_257])
def test_a_draw_does_not_depend_on_the_other_rows(size):
    torch.set_num_threads(2)
    logits = some_logits(len(SETTINGS), seed=3, size=size)
    rows = [
        Row(s, i % 3, list(range(i)))
        for i, s in enumerate([*SETTINGS[:-1], Sampling(temperature=0)])
    ]
    together = [d.token for d in draw(logits.clone(), rows)]
    alone = [draw(logits[i : i + 1].clone(), [rows[i]])[0].token for i in range(len(rows))]
    assert together == alone


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("size", [45, 300, 50_257])
def test_equal_scores_have_equal_weights_wherever_they_stand(size, n_threads):
    """Also at the end of a tensor, or of a thread's part, where vectors are not full."""
    torch.set_num_threads(n_threads)
    for other in torch.linspace(-8, -0.01, 30):
        scores = torch.full((3, size), other.item())
        scores[:, 0] = 0
        weights = weigh(scores, torch.zeros(3, 1), [Sampling()] * 3)
        assert len(weights[:, 1:].unique()) == 1


def test_penalties_of_rows_with_different_ones_are_each_rows_own():
    rows = [
        row(range(9), repetition_penalty=1.5),
        row(range(3, 40), repetition_penalty=1.1, frequency_penalty=0.5),
        row((5, 5, 5, 6), n_prompt=1, frequency_penalty=1.0, presence_penalty=0.25),
        row(range(7)),
        row((1, 2, 1), n_prompt=1, repetition_penalty=0.5, presence_penalty=-1.0),
    ]
    together = some_logits(len(rows))
    alone = together.clone()
    process(together, rows)
    for number in range(len(rows)):
        process(alone[number : number + 1], rows[number : number + 1])
    assert torch.equal(together, alone)
    assert not torch.equal(together, some_logits(len(rows)))


def test_seed_candidate_and_position_each_change_the_draw():
    logits = some_logits(1, scale=0.1)

    def drawn(ids=10, candidate=0, seed=0):
        return draw(logits.clone(), [row(range(ids), candidate, seed=seed)])[0].token

    assert drawn() == drawn()
    assert (
        len(
            {
                drawn(),
                drawn(ids=11),
                drawn(candidate=1),
                drawn(seed=1),
                drawn(seed=-1),
                drawn(seed=2**70),
            }
        )
        == 6
    )


@pytest.mark.parametrize("noise", [0.0, 1 - 2.0**-52])
def test_an_id_without_probability_is_never_drawn(monkeypatch, noise):
    """At both ends of the noise, with totals that float64 rounds up and down."""
    monkeypatch.setattr("gptchat.inference.draw.uniform", lambda *_: noise)
    for seed, size in itertools.product(range(5), (3, 2_000, 10_000, 29_000)):
        logits = torch.full((1, 50_000), -1e9)
        logits[0, 20_000 : 20_000 + size] = some_logits(1, seed, size=size, scale=0.01)[0]
        token = draw(logits, [row()], suppress=(20_000, 19_999 + size))[0].token
        assert token == (20_001 if noise == 0 else 19_998 + size)


def test_greedy_takes_the_best_that_is_left():
    logits = some_logits(2)
    order = logits.argsort(-1, descending=True)
    without_the_best = BadWords([[order[1, 0].item()]])
    rows = [row(temperature=0), row(temperature=0, word_filter=without_the_best)]
    assert [d.token for d in draw(logits.clone(), rows)] == [order[0, 0], order[1, 1]]


def test_greedy_has_no_noise_where_scores_are_equal():
    drawn = draw(torch.zeros(30, V), [row(temperature=0, seed=seed) for seed in range(30)])
    assert [d.token for d in drawn] == torch.zeros(30, V).argmax(-1).tolist()


def test_a_vanishing_temperature_is_greedy():
    logits = some_logits(4)
    drawn = draw(logits.clone(), [row(temperature=1e-300, seed=s) for s in range(4)])
    assert [d.token for d in drawn] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_nothing_to_draw_is_said_and_leaves_the_neighbour_alone(temperature):
    logits = some_logits(3, size=5)
    logits[1] = math.nan
    everything = BadWords([[i] for i in range(5)])
    rows = [
        row(temperature=temperature, word_filter=everything, top_p=0.9),
        row(temperature=temperature),
        row(),
    ]
    tokens = [d.token for d in draw(logits.clone(), rows)]
    assert tokens[:2] == [-1, -1]
    assert tokens[2] == draw(logits[2:].clone(), [row()])[0].token


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


@hypothesis.settings(max_examples=150, deadline=None)
@given(rows_of_scores(), st.data())
def test_top_p_is_what_going_through_a_row_id_by_id_finds(scores, data):
    """At a place of each row: all that is heavier, summed in float64, which rounds otherwise."""
    shares = st.sampled_from([0.0, 1e-17, 1e-9, 0.3, 0.9, 0.95, 0.999999])
    top_p = torch.tensor([[data.draw(shares)] for _ in scores], dtype=torch.float64)
    size = scores.shape[1]
    places = torch.tensor([[data.draw(st.integers(0, size - 1))] for _ in scores])
    weights, total = probabilities_and_sum(scores, [Sampling()] * len(scores))
    above, _, is_outside = heavier(weights, places, top_p * total)
    own = weights.gather(1, places)
    assert torch.equal(above, torch.where(weights > own, weights, 0))
    sums = above.double().sum(-1, keepdim=True)
    limit = top_p * weights.double().sum(-1, keepdim=True)
    clear = (sums - limit).abs() > 1e-6
    assert torch.equal(is_outside[clear], (sums > limit)[clear])
    assert not is_outside[own == weights.amax(-1, keepdim=True)].any()


@hypothesis.settings(max_examples=100, deadline=None)
@given(rows_of_scores())
def test_the_best_of_blocks_is_the_best(scores):
    assert torch.equal(best(scores), scores.max(-1, keepdim=True).indices)


@hypothesis.settings(max_examples=100, deadline=None)
@given(rows_of_scores(), st.floats(0, 1 - 2**-52))
def test_a_place_is_drawn_where_the_cumulative_weight_passes_the_noise(scores, noise):
    weights, total = probabilities_and_sum(scores, [Sampling()] * len(scores))
    places = draw_place(
        weights, block_sums(weights), torch.full((len(weights), 1), noise, dtype=torch.float64)
    )
    own = weights.gather(1, places)
    cumulative = weights.double().cumsum(-1)
    after = cumulative.gather(1, places) / cumulative[:, -1:]
    assert (own > 0).all()
    assert (after - own <= noise + 1e-6).all() and (after >= noise - 1e-6).all()
    torch.testing.assert_close(total.double() / ONE, cumulative[:, -1:], atol=1e-9, rtol=1e-6)


def test_an_id_is_outside_where_better_ones_have_all_of_top_p():
    weights = torch.tensor([[0.5, 0.25, 0.25]]).expand(3, -1)
    outside = outside_top_p(weights[0], torch.tensor([0.5 * ONE]))
    assert outside.tolist() == [False, True, True]


def test_a_rare_id_is_drawn_without_top_p_also_in_company_of_a_row_with_it(monkeypatch):
    """The sum of what is better than it rounds to all there is."""
    monkeypatch.setattr("gptchat.inference.draw.uniform", lambda *_: 1 - 2.0**-52)
    logits = torch.tensor([[0.0, math.log(1e-9)]] * 2)
    assert [d.token for d in draw(logits, [row(), row(top_p=0.9)])] == [1, 0]


def test_in_a_block_of_rare_ids_one_without_weight_is_not_drawn():
    weights = torch.zeros(1, 512)
    weights[0, 0] = 1
    weights[0, 256:500] = 2.0**-41  # together more than a ONEth
    noise = torch.tensor([[1 - 2.0**-52]], dtype=torch.float64)
    assert draw_place(weights, block_sums(weights), noise).item() == 499


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_top_p_over_many_ids_leaves_the_neighbours_of_a_row_without_scores_alone(bad):
    logits = some_logits(3, size=4096)
    logits[1] = bad
    rows = [row(top_p=0.9, seed=seed) for seed in range(3)]
    tokens = [d.token for d in draw(logits.clone(), rows)]
    alone = [draw(logits[i : i + 1].clone(), [rows[i]])[0].token for i in (0, 2)]
    assert tokens == [alone[0], -1, alone[1]]

"""Batches: functions of their number, all once an epoch, nothing cropped, dialogues kept apart."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptchat.config import Config, DataConfig, TokenizerConfig
from gptchat.data import row_order
from gptchat.data.batches import Batches, prefetch
from gptchat.data.dialogue import encode_example
from gptchat.data.keyed_draw import draw_key, permute
from gptchat.data.row_order import pack
from gptchat.data.shards import open_shards, write
from gptchat.data.tokenizer import Tokenizer, train_tokenizer

quick = settings(derandomize=True, deadline=None, max_examples=100)
N_CTX, ROWS = 32, 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """(LM shards, chat shards, tokenizer).

    37 documents; 151 dialogues of 2 to 5 turns, some longer than a row.
    """
    folder, rng = tmp_path_factory.mktemp("batches"), random.Random(1)
    words = "the a cat dog sat ran on mat fast and then home".split()

    def text(most):
        return " ".join(rng.choices(words, k=rng.randint(1, most)))

    (folder / "lm.txt").write_text("\n\n".join(text(60) for _ in range(37)))
    with (folder / "chat.tsv").open("w") as file:
        for _ in range(151):
            turns = [text(rng.choice((3, 8, 40))) for _ in range(rng.randint(2, 5))]
            file.write("\t".join(turns) + "\n")
    tokenizer = TokenizerConfig(
        dir=str(folder / "tok"), vocab_size=300, files=(str(folder / "lm.txt"),)
    )
    train_tokenizer(tokenizer).save(folder / "tok")
    found = []
    for task, name in (("lm", "lm.txt"), ("chatlm", "chat.tsv")):
        data = DataConfig(train=(str(folder / name),), shards=str(folder / task))
        config = Config(task=task, tokenizer=tokenizer, data=data)
        write(config)
        found.append(open_shards(config, "train", Tokenizer.load(folder / "tok")))
    return *found, Tokenizer.load(folder / "tok")


@pytest.fixture
def lm(shards):
    return Batches([shards[0]], shards[2], N_CTX, ROWS, seed=7)


@pytest.fixture
def chat(shards, monkeypatch):
    monkeypatch.setattr(row_order, "POOL", 20)  # several pools, the last one not full
    return Batches([shards[1]], shards[2], N_CTX, ROWS, seed=7)


def equal(one, other):
    """Whether two batches are the same in every tensor and number."""
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(vars(one).values(), vars(other).values(), strict=True)
    )


def rows_of(batches, first, n):
    """Rows first..first+n-1 of the endless sequence, as (field -> (T,)) dictionaries."""
    rows = []
    for number in range(first // ROWS, -(-(first + n) // ROWS)):
        batch = batches.micro_batch(number)
        fields = {
            key: value for key, value in vars(batch).items() if isinstance(value, torch.Tensor)
        }
        rows += [{key: value[i] for key, value in fields.items()} for i in range(ROWS)]
    return rows[first % ROWS : first % ROWS + n]


def examples_in(row):
    """(input ids, types, positions, targets) of each dialogue in a packed row."""
    found = []
    for number in range(int(row["segments"].max()) + 1):
        inside = row["segments"] == number
        found.append(
            tuple(
                tuple(row[key][inside].tolist())
                for key in ("input_ids", "token_type_ids", "position_ids", "targets")
            )
        )
    return found


def expected_examples(batches):
    """The same, of every dialogue by itself, counted."""
    shards, tokenizer = batches.sources[0], batches.tokenizer
    examples = [
        encode_example(shards.dialogue(i), tokenizer.cls_id, tokenizer.sep_id, N_CTX)
        for i in range(shards.documents)
    ]
    return Counter(
        (
            tuple(e.input_ids.tolist()),
            tuple(e.token_type_ids.tolist()),
            tuple(range(len(e.targets))),
            tuple(e.targets.tolist()),
        )
        for e in examples
    )


@quick
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n, key):
    assert sorted(permute(np.arange(n), n, key)) == list(range(n))


@quick
@given(
    st.lists(st.integers(1, 50), max_size=80),
    st.integers(50, 60),
    st.randoms(use_true_random=False),
)
def test_pack_takes_each_once_and_overfills_nothing(lengths, room, rng):
    rows = pack(lengths, room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= room for row in rows)
    shuffled = rng.sample(lengths, len(lengths))
    # Rows are counted once, then dialogues change places.
    assert len(pack(shuffled, room)) == len(rows)


def test_lm_epoch_holds_every_token_and_repeats_less_than_a_window(lm):
    stream = lm.sources[0].tokens(0, lm.sources[0].n_tokens)
    n = lm.rows_per_epoch
    assert n == -(-len(stream) // N_CTX)
    for epoch in range(3):
        starts = [lm.orders[0].row(epoch * n + row) for row in range(n)]
        counts = Counter(
            int(token) % len(stream) for start in starts for token in range(start, start + N_CTX)
        )
        assert set(counts) == set(range(len(stream))) and max(counts.values()) <= 2
        for row, start in zip(rows_of(lm, epoch * n, n), starts, strict=True):
            around = stream[np.arange(start - 1, start + N_CTX) % len(stream)].tolist()
            assert (
                row["input_ids"].tolist() == around[:-1] and row["targets"].tolist() == around[1:]
            )
    offsets = {lm.orders[0].row(epoch * n) % N_CTX for epoch in range(9)}
    assert len(offsets) > 4  # cut elsewhere in each epoch


def test_lm_text_shorter_than_a_window_is_repeated(lm, shards, monkeypatch):
    batches = Batches([shards[0]], shards[2], lm.sources[0].n_tokens * 2 + 5, 1)
    assert (
        batches.rows_per_epoch == 1
        and batches.micro_batch(0).n_targets == lm.sources[0].n_tokens * 2 + 5
    )
    (batch,) = batches.evaluation()
    assert batch.n_targets == lm.sources[0].n_tokens


def test_lm_evaluation_is_the_stream_in_order_behind_an_eos(lm):
    found = list(lm.evaluation())
    stream = lm.sources[0].tokens(0, lm.sources[0].n_tokens).tolist()
    targets = torch.cat([batch.targets.flatten() for batch in found])
    inputs = torch.cat([batch.input_ids.flatten() for batch in found])
    assert targets[targets != -100].tolist() == stream
    assert inputs[: len(stream)].tolist() == [lm.tokenizer.eos_id, *stream[:-1]]
    assert (
        sum(batch.n_targets for batch in found) == len(stream)
        and lm.n_bytes == lm.sources[0].n_bytes
    )


def test_every_dialogue_is_whole_and_once_in_an_epoch(chat):
    n = chat.rows_per_epoch
    expected, orders = expected_examples(chat), []
    for epoch in range(3):
        rows = rows_of(chat, epoch * n, n)
        found = [example for row in rows for example in examples_in(row)]
        assert Counter(found) == expected
        orders.append(found)
    assert orders[0] != orders[1] != orders[2]


def test_chat_evaluation_is_everything_once_in_order(chat):
    found = list(chat.evaluation())
    rows = [
        {key: value[i] for key, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        for batch in found
        for i in range(len(batch.targets))
    ]
    assert Counter(example for row in rows for example in examples_in(row)) == expected_examples(
        chat
    )
    assert all(equal(a, b) for a, b in zip(found, chat.evaluation(), strict=True))
    targets = [id for batch in found for id in batch.targets[batch.targets != -100].tolist()]
    assert chat.n_bytes == len(b"".join(chat.tokenizer.token_bytes[id] for id in targets)) > 0


# --- targets = "responder"


def responder_batches(shards):
    """Batches of every turn of the responder."""
    return Batches([shards[1]], shards[2], N_CTX, ROWS, seed=7, targets="responder")


def answers_of(batches):
    """(dialogue, turn) of each turn that the responder gives as an answer, counted."""
    counted = Counter()
    source = batches.sources[0]
    for number in range(source.documents):
        for turn, (speaker, _) in enumerate(source.dialogue(number)):
            if speaker == 1 and turn > 0:
                counted[number, turn] += 1
    return counted


def test_every_answer_of_the_responder_is_a_target_once_in_an_epoch(shards, monkeypatch):
    monkeypatch.setattr(row_order, "POOL", 20)
    batches = responder_batches(shards)
    found = Counter()
    for number in range(batches.rows_per_epoch):
        for dialogue, first, last in batches.orders[0].row(number):
            turns = shards[1].dialogue(dialogue)[first:last]
            assert turns[-1][0] == 1  # what follows the last answer would teach nothing
            for turn, (speaker, _) in enumerate(turns):
                if speaker == 1 and turn > 0:
                    found[dialogue, first + turn] += 1
    assert found == answers_of(batches)
    # Some dialogues are longer than a row, and are cut.
    assert any(first > 0 for row in map(batches.orders[0].row, range(50)) for _, first, _ in row)


def test_answers_end_in_cls_and_nothing_else_is_a_target(shards):
    batches = responder_batches(shards)
    cls_id, sep_id = batches.tokenizer.cls_id, batches.tokenizer.sep_id
    n_cut = 0
    for row in rows_of(batches, 0, batches.rows_per_epoch):
        for ids, types, positions, targets in examples_in(row):
            assert positions == tuple(range(len(ids)))
            following = ids[1:] + (cls_id,)
            for i, target in enumerate(targets):
                if target == cls_id:
                    assert types[i] == 1 and following[i] in (sep_id, cls_id)
                elif i == N_CTX - 1:
                    n_cut += target != -100  # of an answer whose end is cut
                elif target != -100:
                    assert types[i] == 1 and target == following[i]
    assert 0 < n_cut < 40  # answers too long for a row even without history


def test_with_turns_both_speakers_are_targets_and_each_turn_ends_in_cls(shards):
    tokenizer = shards[2]
    options = {"cls_id": tokenizer.cls_id, "sep_id": tokenizer.sep_id, "n_ctx": 100}
    turns = [(0, [10, 11]), (1, [12]), (0, [13, 14]), (1, [15])]
    cls_id = tokenizer.cls_id
    both = encode_example(turns, **options, targets="turns").targets.tolist()
    assert both == [-100, -100, 12, cls_id, 13, 14, cls_id, 15, cls_id]
    responder = encode_example(turns, **options, targets="responder").targets.tolist()
    assert responder == [-100, -100, 12, cls_id, -100, -100, -100, 15, cls_id]


# --- several sources


def mixed(shards, weights, **options):
    """LM batches of two sources: the test's text, and its first file of documents again."""
    return Batches([shards[0], shards[0]], shards[2], N_CTX, ROWS, weights=weights, **options)


@pytest.mark.parametrize("weights", [(1, 3), (0.2, 0.8), (1e-6, 1), (5, 5, 1)])
def test_sources_have_their_shares_of_the_rows_at_any_time(weights):
    mixture = row_order.Mixture(weights)
    counts = [0] * len(weights)
    for row in range(2500):
        source, number = mixture.place(row)
        assert number == counts[source]  # each source's rows follow one another
        counts[source] += 1
        for n, weight in zip(counts, weights, strict=True):
            share = max(weight / sum(weights), 1 / row_order.MIXTURE_ROWS)
            assert abs(n - share * (row + 1)) <= 2 + row // 500
    assert min(counts) >= 2500 // row_order.MIXTURE_ROWS  # a row of every block at least


def test_a_source_of_a_mixture_gives_the_rows_that_it_gives_alone(shards, monkeypatch):
    alone = Batches([shards[0]], shards[2], N_CTX, ROWS, seed=7)
    mixture = mixed(shards, (1, 3), seed=7)
    rows = rows_of(mixture, 0, 40)
    places = [mixture.mixture.place(row) for row in range(40)]
    for source, share in ((0, 10), (1, 30)):
        own = [row for row, place in zip(rows, places, strict=True) if place[0] == source]
        expected = rows_of(alone, 0, share)
        assert len(own) == share
        for one, other in zip(own, expected, strict=True):
            assert torch.equal(one["targets"], other["targets"])


@pytest.mark.parametrize("task", ["lm", "chat"])
def test_a_batch_depends_on_seed_and_number_only(request, shards, task):
    first = request.getfixturevalue(task)
    order = random.Random(0).sample(range(60), 60)
    found = {number: first.micro_batch(number) for number in order}
    again = Batches([first.sources[0]], first.tokenizer, N_CTX, ROWS, seed=7)
    assert all(equal(again.micro_batch(number), found[number]) for number in range(60))
    other = Batches([first.sources[0]], first.tokenizer, N_CTX, ROWS, seed=8)
    assert not equal(other.micro_batch(0), found[0])


@pytest.mark.parametrize("task", ["lm", "chat"])
def test_order_is_the_same_for_any_number_of_processes_and_any_start(request, task):
    batches = request.getfixturevalue(task)

    def steps(first, last, per_step, world):
        found = {}
        for rank in range(world):
            with prefetch(batches, first, last, per_step, range(rank, per_step, world)) as made:
                for step, own in zip(range(first, last), made, strict=True):
                    found |= {
                        step * per_step + rank + i * world: batch for i, batch in enumerate(own)
                    }
        return found

    whole = steps(0, 6, 4, 1)
    assert sorted(whole) == list(range(24))
    for other in (steps(0, 6, 4, 2), steps(0, 6, 4, 4), steps(0, 3, 8, 3), steps(3, 6, 4, 2)):
        assert all(equal(batch, whole[number]) for number, batch in other.items())


def test_keyed_draw_never_changes():
    """Or a resumed run would go on with other batches."""
    assert draw_key() == 5694367389426422167
    assert draw_key(7, 0, "offset") == 4047654342825926543
    assert len({draw_key(seed, epoch) for seed in range(30) for epoch in range(30)}) == 900


def test_steps_per_epoch_counts_the_last_one(chat):
    for per_step in (1, 3):
        steps = chat.steps_per_epoch(per_step)
        assert (steps - 1) * per_step * ROWS < chat.rows_per_epoch <= steps * per_step * ROWS


def test_prefetch_gives_empty_micro_batches_beyond_the_step_and_hands_on_errors(lm, monkeypatch):
    with prefetch(lm, 0, 2, 3, range(1, 4, 2)) as steps:
        (full, empty), _ = steps
    assert full.n_targets == ROWS * N_CTX and empty.n_targets == empty.n_tokens == 0
    assert empty.inputs("cpu")["targets"].shape == (0,)
    monkeypatch.setattr(lm, "micro_batch", lambda number: 1 / 0)
    with pytest.raises(ZeroDivisionError), prefetch(lm, 0, 2, 1, [0]) as steps:
        next(steps)


def test_inputs_name_the_positions_that_have_targets(chat):
    batch = chat.micro_batch(0)
    inputs = batch.inputs("cpu")
    n, positions, targets = batch.n_targets, inputs["target_positions"], inputs["targets"]
    assert torch.equal(positions[:n], (batch.targets.flatten() != -100).nonzero()[:, 0])
    assert torch.equal(batch.targets.flatten()[positions], targets)
    assert (targets[n:] == -100).all()
    assert len(positions) == min(batch.targets.numel(), -(-n // 256) * 256)
    assert batch.n_tokens == int((batch.segments >= 0).sum())

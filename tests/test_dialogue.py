"""The chat format: layout, types and targets, truncation, prompts, TSV rows, JSONL."""

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptchat.console import UserError
from gptchat.data.dialogue import IGNORE, encode_example, encode_prompt, fit
from gptchat.data.dialogue_files import escape, read_dialogues, read_prompts, unescape
from gptchat.data.reading import LONGEST_LINE

CLS, SEP = 4, 5
CHARACTERS = st.characters(exclude_characters="\0", codec="utf-8")
TURN = st.text(CHARACTERS, min_size=1, max_size=8).filter(str.strip)
PROPERTY = settings(derandomize=True, max_examples=150, deadline=None)


def turns_of(lengths: list[int]) -> list[tuple[int, list[int]]]:
    """Alternating turns of given lengths, every token different."""
    ids = iter(range(100, 100_000))
    return [
        ((len(lengths) - n) % 2, [next(ids) for _ in range(length)])
        for n, length in enumerate(lengths)
    ]


LENGTHS = st.lists(st.integers(0, 30), min_size=2, max_size=6)


def texts(path: Path) -> list[list[str]]:
    """The turns of each dialogue of a file."""
    return [[text for _, text in turns] for turns in read_dialogues(path)]


def test_two_turns_are_context_sep_response_cls() -> None:
    example = encode_example([(0, [10, 11]), (1, [20, 21])], CLS, SEP, 16)
    assert example.input_ids.tolist() == [10, 11, SEP, 20, 21]
    assert example.token_type_ids.tolist() == [0, 0, 1, 1, 1]
    assert example.targets.tolist() == [IGNORE, IGNORE, 20, 21, CLS]
    assert (
        example.input_ids.dtype == example.token_type_ids.dtype == example.targets.dtype == np.int64
    )


def test_a_turn_and_its_sep_have_the_speakers_type_and_only_the_response_is_a_target() -> None:
    example = encode_example([(1, [10]), (0, [20, 21]), (0, [30]), (1, [40])], CLS, SEP, 16)
    assert example.input_ids.tolist() == [10, SEP, 20, 21, SEP, 30, SEP, 40]
    assert example.token_type_ids.tolist() == [1, 0, 0, 0, 0, 0, 1, 1]
    assert example.targets.tolist() == [IGNORE] * 6 + [40, CLS]


def test_targets_all_are_the_ids_that_follow() -> None:
    example = encode_example([(0, [10, 11]), (1, [20])], CLS, SEP, 16, targets="all")
    assert example.targets.tolist() == [11, SEP, 20, CLS]


def test_oldest_turns_go_first_then_the_front_of_the_context_then_the_end_of_the_response() -> None:
    turns = turns_of([4, 6, 2])  # ids 100-103, 104-109, 110-111
    kept = {
        n_ctx: encode_example(turns, CLS, SEP, n_ctx).input_ids.tolist()
        for n_ctx in (14, 13, 9, 8, 6, 4)
    }
    assert kept[14] == [100, 101, 102, 103, SEP, 104, 105, 106, 107, 108, 109, SEP, 110, 111]
    assert kept[13] == kept[9] == [104, 105, 106, 107, 108, 109, SEP, 110, 111]
    assert kept[8] == [105, 106, 107, 108, 109, SEP, 110, 111]
    assert kept[6] == [107, 108, 109, SEP, 110, 111]
    assert kept[4] == [108, 109, SEP, 110]
    assert encode_example(turns, CLS, SEP, 6).targets.tolist() == [IGNORE] * 3 + [110, 111, CLS]
    assert encode_example(turns, CLS, SEP, 4).targets.tolist() == [IGNORE, IGNORE, 110, 111]


@PROPERTY
@given(LENGTHS, st.integers(2, 80))
def test_truncation_keeps_what_it_promises(lengths: list[int], n_ctx: int) -> None:
    turns = turns_of(lengths)
    example = encode_example(turns, CLS, SEP, n_ctx, targets="all")
    ids, context, response = example.input_ids.tolist(), turns[-2][1], turns[-1][1]
    whole = [id for n, (_, turn) in enumerate(turns) for id in ([SEP] if n else []) + turn] + [CLS]
    assert (
        len(ids)
        == len(example.token_type_ids)
        == len(example.targets)
        == fit(lengths, n_ctx)[2]
        <= n_ctx
    )
    shown = ids + example.targets.tolist()[-1:]
    assert any(
        whole[start : start + len(shown)] == shown for start in range(len(whole))
    )  # nothing but cuts at the ends
    complete = shown[-1] == CLS
    front = ids.index(SEP)  # tokens of the first turn kept
    if (
        ids.count(SEP) > 1 or lengths[-2] == front
    ):  # no token of the context is missing: what was cut are whole turns
        turns_kept = ids.count(SEP) + 1
        assert front == lengths[-turns_kept]
        if turns_kept < len(lengths):
            assert (
                len(ids) + 1 + lengths[-turns_kept - 1] > n_ctx
            )  # one turn more would not have fitted
    else:
        assert min(len(context), n_ctx // 2) <= front < len(context) and len(ids) == n_ctx
    if not complete:
        assert front == min(len(context), n_ctx // 2) and len(response) + front + 1 > n_ctx


@PROPERTY
@given(LENGTHS, st.integers(2, 80))
def test_response_targets_are_those_of_all_on_the_response_alone(
    lengths: list[int], n_ctx: int
) -> None:
    turns = turns_of(lengths)
    ours, every = (
        encode_example(turns, CLS, SEP, n_ctx, targets) for targets in ("response", "all")
    )
    assert (ours.input_ids == every.input_ids).all()
    expected = [t if t == CLS or t in turns[-1][1] else IGNORE for t in every.targets.tolist()]
    assert ours.targets.tolist() == expected
    assert (ours.targets != IGNORE).any()


@PROPERTY
@given(LENGTHS, st.integers(0, 30))
def test_a_prompt_is_the_beginning_of_its_training_example(lengths: list[int], begun: int) -> None:
    turns = turns_of(lengths)
    example = encode_example(turns, CLS, SEP, 1000)
    beginning = turns[-1][1][:begun]
    ids, types = encode_prompt(turns[:-1], beginning, SEP, 1000)
    assert (
        ids == example.input_ids.tolist()[: len(ids)]
        and types == example.token_type_ids.tolist()[: len(ids)]
    )
    assert ids[len(ids) - len(beginning) - 1 :] == [SEP, *beginning] and set(
        types[-len(beginning) - 1 :]
    ) == {1}


@PROPERTY
@given(LENGTHS, st.integers(0, 5), st.integers(0, 80))
def test_a_prompt_fills_its_room_with_whole_turns_or_is_refused(
    lengths: list[int], begun: int, room: int
) -> None:
    turns, beginning = turns_of(lengths), list(range(7, 7 + begun))
    costs = [length + 1 for length in lengths]
    fitting = [n for n in range(1, len(lengths) + 1) if sum(costs[-n:]) + begun <= room]
    if not fitting:
        with pytest.raises(
            UserError, match=f"takes {costs[-1] + begun} tokens; wanted {room} at most"
        ):
            encode_prompt(turns, beginning, SEP, room)
        return
    ids, types = encode_prompt(turns, beginning, SEP, room)
    assert (ids, types) == encode_prompt(turns[-max(fitting) :], beginning, SEP, 1000)
    assert len(ids) == len(types) <= room


@PROPERTY
@given(st.text(st.sampled_from("\\tnrx\t\n\r é日"), max_size=12) | st.text(max_size=12))
def test_escape_comes_back_and_fits_a_column(text: str) -> None:
    assert unescape(escape(text)) == text
    assert not set(escape(text)) & set("\t\n\r")


@PROPERTY
@given(st.lists(st.lists(TURN, min_size=2, max_size=5), max_size=6))
def test_rows_come_back_from_a_file(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.tsv"
    path.write_bytes("".join("\t".join(map(escape, row)) + "\n" for row in rows).encode())
    assert texts(path) == rows


def test_all_line_ends_byte_order_marks_and_ragged_tables_are_read(tmp_path: Path) -> None:
    path = tmp_path / "table.tsv"
    path.write_bytes(b"\xef\xbb\xbfhi\thello\r\n\r\n\t\twhat?\tat\\tall\rC:\\\\n\\o/\trow\r")
    assert texts(path) == [["hi", "hello"], ["what?", "at\tall"], ["C:\\n\\o/", "row"]]
    assert [prompt.place[-1] for prompt in read_prompts(path)] == ["1", "3", "4"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("alone", "one column"),
        ("hi\thello\t", "no text in column 3"),
        ("hi\t\\n", "no text in column 2"),
        ("hi\tf\0", "a NUL character"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: str, problem: str) -> None:
    path = tmp_path / "bad.tsv"
    path.write_text(f"a\tb\n\n{row}\n")
    with pytest.raises(UserError, match=re.escape(f"bad.tsv:3: found {problem}; wanted turns")):
        texts(path)


def test_a_longest_line_is_read_and_a_longer_one_refused_in_flat_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.tsv"
    turn = "x" * (LONGEST_LINE - 2)
    path.write_text(f"a\tb\na\t{turn}\n")
    assert texts(path)[1] == ["a", turn]
    path.write_text(f"a\tb\na\t{'x' * 50_000_000}\n")
    tracemalloc.start()
    with pytest.raises(UserError, match="long.tsv:2: found a line of more than 1,000,000 char"):
        texts(path)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


FORMS = {
    "messages": ("role", "content", {"assistant": 1, "user": 0, "system": 0, "developer": 0}),
    "conversations": ("from", "value", {"gpt": 1, "human": 0, "system": 0}),
}


@pytest.mark.parametrize("key", FORMS)
def test_dialogues_come_back_from_jsonl(tmp_path, key: str) -> None:  # type: ignore[no-untyped-def]
    role, text, speakers = FORMS[key]
    path = tmp_path / "dialogues.jsonl"
    responder = st.tuples(st.sampled_from([name for name in speakers if speakers[name]]), TURN)
    earlier = st.lists(st.tuples(st.sampled_from(list(speakers)), TURN), min_size=1, max_size=4)
    dialogue = st.tuples(earlier, responder).map(lambda parts: [*parts[0], parts[1]])

    @PROPERTY
    @given(st.lists(dialogue, max_size=4), st.booleans())
    def check(dialogues: list[list[tuple[str, str]]], ascii: bool) -> None:
        lines = []
        for turns in dialogues:
            messages = [{role: name, text: said, "weight": 1} for name, said in turns]
            lines.append(json.dumps({"id": 1, key: messages}, ensure_ascii=ascii))
        path.write_bytes("\n".join(lines).encode())
        expected = [[(speakers[name], said) for name, said in turns] for turns in dialogues]
        assert list(read_dialogues(path)) == expected
        assert [prompt.turns for prompt in read_prompts(path)] == expected

    check()


USER = '{"role": "user", "content": "hi"}'
GOOD = f'{{"messages": [{USER}, {{"role": "assistant", "content": "hello"}}]}}'
HALF = r'{"from": "human", "value": "\ud800"}'  # of a surrogate pair


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"messages": [}', ":2: column 15: found no JSON (Expecting value)"),
        ("[" * 100_000, ":2: found JSON that cannot be read ("),
        ('{"text": "hi"}', ":2: found neither key; wanted messages or conversations"),
        ({"messages": "hi"}, ":2: messages: found 'hi'; wanted a list of messages"),
        ({"messages": [USER]}, ":2: messages: found 1; wanted 2 or more"),
        ({"messages": [USER, "a"]}, ":2: messages[1]: found 'a'; wanted an object with role and"),
        ({"messages": [{"content": "hi"}]}, ":2: messages[0].role: found nothing; wanted one of"),
        (
            {"messages": [USER, {"role": "assistant", "content": " \n"}]},
            r":2: messages[1].content: found ' \n'; wanted some text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            ":2: messages[0].content: found [{'type': 'text'}]; wanted some text",
        ),
        (
            {"conversations": [{"from": "human", "value": "\ud800"}]},
            ":2: conversations[0].value: found half a surrogate pair",
        ),
        (
            {"messages": [USER, USER]},
            ":2: messages[1].role: found 'user'; wanted 'assistant', the response last",
        ),
    ],
)
def test_a_bad_object_is_named_by_file_line_and_field(
    tmp_path: Path, row: str | dict[str, Any], message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    good = {"messages": [USER, {"role": "assistant", "content": "hello"}]}
    line = row if isinstance(row, str) else json.dumps(row)
    path.write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(UserError, match=re.escape("bad.jsonl" + message)) as raised:
        texts(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < len(str(path)) + 200

"""The chat format: layout, types and targets, truncation, prompts, TSV rows, JSONL."""

import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptchat.console import UserError
from gptchat.data.dialogue import IGNORE, alternate, encode_example, encode_prompt, fit
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


def test_ids_may_be_arrays_of_any_integer_type() -> None:
    plain = turns_of([3, 0, 4])
    arrays = [(speaker, np.array(ids, np.uint16)) for speaker, ids in plain]
    for one, other in zip(
        vars(encode_example(plain, CLS, SEP, 8)).values(),
        vars(encode_example(arrays, CLS, SEP, 8)).values(),
        strict=True,
    ):
        assert one.tolist() == other.tolist() and one.dtype == other.dtype


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


def test_a_prompt_without_turns_is_the_type_1_sep() -> None:
    assert encode_prompt([], [9], SEP, 2) == ([SEP, 9], [1, 1])


@PROPERTY
@given(st.text(st.sampled_from("\\tnrx\t\n\r é日"), max_size=12) | st.text(max_size=12))
def test_escape_comes_back_and_fits_a_column(text: str) -> None:
    assert unescape(escape(text)) == text
    assert not set(escape(text)) & set("\t\n\r")


def test_other_backslashes_stand_for_themselves() -> None:
    assert unescape(r"a\b \o/ C:\\new \"") == 'a\\b \\o/ C:\\new \\"'


@PROPERTY
@given(st.lists(st.lists(TURN, min_size=2, max_size=5), max_size=6))
def test_rows_come_back_from_a_file(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.tsv"
    path.write_bytes("".join("\t".join(map(escape, row)) + "\n" for row in rows).encode())
    assert texts(path) == rows


def test_windows_files_and_ragged_tables_are_read(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "table.tsv"
    path.write_bytes(b"\xef\xbb\xbfhi\thello\r\n\r\n\t\twhat?\tnothing\\tat all\r\nlast\trow")
    assert texts(path) == [["hi", "hello"], ["what?", "nothing\tat all"], ["last", "row"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tb\nalone\n", r":2: found one column; wanted"),
        (b"a\tb\n\talone\n", r":2: found one column; wanted"),
        (b"a\tb\nhi\thello\t\n", r":2: found an empty column 3; wanted"),
        (b"a\tb\nhi\t \n", r":2: found white space alone in column 2; wanted"),
        (b"a\tb\nhi\t\\n\n", r":2: found white space alone in column 2; wanted"),
        (b"a\tb\rc\td\re\tf\0\n", r":3: found a NUL character; wanted"),
        (b"a\tb\nc\t\xe3\x81\n", r": byte 6: found invalid UTF-8 in line 2"),
    ],
)
def test_a_bad_row_is_named_by_file_and_place(tmp_path, content: bytes, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "bad.tsv"
    path.write_bytes(content)
    with pytest.raises(UserError, match="bad.tsv" + message) as raised:
        texts(path)
    assert "\n" not in str(raised.value)


def test_a_lone_cr_ends_a_row_as_it_ends_a_line_of_text(tmp_path: Path) -> None:
    path = tmp_path / "old.tsv"
    path.write_bytes(b"\xef\xbb\xbfhi\thello\rhow\tfine\r\nlast\trow\r")
    assert texts(path) == [["hi", "hello"], ["how", "fine"], ["last", "row"]]


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


def test_a_file_that_cannot_be_read_is_told_in_one_line() -> None:
    path = Path("/proc/self/mem")  # its first page is not there
    if not path.exists():
        pytest.skip("needs /proc")
    with pytest.raises(UserError, match="/proc/self/mem: cannot be read: Input/output error"):
        texts(path)


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


def test_all_line_ends_blank_lines_and_both_forms_are_read_from_jsonl(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "mixed.JSONL"
    path.write_bytes(
        b'\xef\xbb\xbf{"messages": [{"role": "user", "content": "hi"}, '
        b'{"role": "assistant", "content": "a\xe2\x80\xa8b"}]}\r\n\r'
        b'{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}'
    )
    assert list(read_dialogues(path)) == [[(0, "hi"), (1, "a\u2028b")], [(0, "x"), (1, "y")]]
    assert [prompt.place for prompt in read_prompts(path)] == [f"{path}:1", f"{path}:3"]


def test_a_prompt_of_one_message_is_no_training_example(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for line in ('[{"role": "user", "content": "hi"}]', '[{"role": "assistant", "content": "hi"}]'):
        path = tmp_path / "prompt.jsonl"
        path.write_text(f'{{"messages": {line}}}')
        assert [len(prompt.turns) for prompt in read_prompts(path)] == [1]
        with pytest.raises(UserError, match=":1: messages: found 1; wanted 2 or more"):
            list(read_dialogues(path))


USER = '{"role": "user", "content": "hi"}'
GOOD = f'{{"messages": [{USER}, {{"role": "assistant", "content": "hello"}}]}}'
HALF = r'{"from": "human", "value": "\ud800"}'  # of a surrogate pair


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hi\thello", ":3: column 1: found no JSON (Expecting value)"),
        (GOOD[:-1], f":3: column {len(GOOD)}: found no JSON ("),
        ("[" * 100_000, ":3: found JSON that cannot be read ("),
        ("1" * 5000, ":3: found JSON that cannot be read ("),
        (f"[{GOOD}]", ":3: found [{'messages': [{'role'"),
        ('{"text": "hi"}', ":3: found neither key; wanted messages or conversations"),
        ('{"messages": [], "conversations": []}', ":3: found both keys; wanted"),
        ('{"messages": "hi"}', ":3: messages: found 'hi'; wanted a list of messages"),
        ('{"messages": null}', ":3: messages: found nothing; wanted a list"),
        ('{"messages": []}', ":3: messages: found 0; wanted 2 or more"),
        (f'{{"messages": [{USER}, "a\\nb"]}}', r":3: messages[1]: found 'a\nb'; wanted an object"),
        ('{"messages": [{"content": "hi"}]}', ":3: messages[0].role: found nothing; wanted one of"),
        (
            '{"messages": [{"role": ["user"], "content": "hi"}]}',
            ":3: messages[0].role: found ['user']; wanted one of assistant, user, system, dev",
        ),
        (
            f'{{"conversations": [{USER}]}}',
            ":3: conversations[0].from: found nothing; wanted one of gpt, human, system",
        ),
        (
            f'{{"messages": [{USER}, {{"role": "assistant", "content": ""}}]}}',
            ":3: messages[1].content: found ''; wanted some text",
        ),
        (
            f'{{"messages": [{USER}, {{"role": "assistant", "content": " \\n"}}]}}',
            r":3: messages[1].content: found ' \n'; wanted some text",
        ),
        (
            r'{"messages": [{"role": "user", "content": "a\u0000b"}]}',
            ":3: messages[0].content: found a NUL character; wanted text without it",
        ),
        (GOOD.replace("hi", "h\0i"), ":3: column 45: found no JSON (Invalid control character at)"),
        (
            GOOD.replace("hi", "x" * LONGEST_LINE),
            ":3: found a line of more than 1,000,000 characters; wanted a dialogue a line",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
            ":3: messages[0].content: found [{'type': 'text'}]; wanted some text",
        ),
        (f'{{"conversations": [{HALF}]}}', ":3: conversations[0].value: found half a surrogate"),
        (
            f'{{"messages": [{USER}, {USER}]}}',
            ":3: messages[1].role: found 'user'; wanted 'assistant', the response last",
        ),
        ("\udcff", f": byte {len(GOOD) + 2}: found invalid UTF-8 in line 3"),
    ],
)
def test_a_bad_line_of_jsonl_is_named_by_file_and_field(tmp_path, line: str, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(f"{GOOD}\n\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=re.escape("bad.jsonl" + message)) as raised:
        list(read_dialogues(path))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < len(str(path)) + 200


def test_speakers_alternate_backwards_from_the_response() -> None:
    assert alternate(["a", "b"]) == [(0, "a"), (1, "b")]
    assert alternate(["a", "b", "c"]) == [(1, "a"), (0, "b"), (1, "c")]

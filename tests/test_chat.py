"""The chat in a real terminal, and answers to one prompt and to files."""

import io
import json
import os
import re
import string
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch
from hf_models import byte_tokenizer, shake

from gptchat import chat
from gptchat.console import UserError, cli
from gptchat.data.dialogue import TextTurn
from gptchat.data.dialogue_files import read_dialogues, read_prompts
from gptchat.inference.engine import Request, generate
from gptchat.inference.generate import Piece, TextGenerator, load_generator
from gptchat.inference.sampling import Sampling
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2, GPT2Config

torch.set_num_threads(1)

PROMPT, LABEL = "you>", "bot>"
# Fields of Sampling that the chat does not offer as numbers under their own names.
OTHER_FIELDS = {
    "logit_bias": "of an id each",
    "word_filter": "--forbid",
    "logprobs": "for the server",
}


def read_rows(path: str | Path) -> list[list[str]]:
    """The turns of each dialogue, or prompt, of a file."""
    return [[text for _, text in prompt.turns] for prompt in read_prompts(path)]


def babbler(
    directory: Path,
    task: str = "chatlm",
    n_ctx: int = 1024,
    says: str = string.ascii_lowercase + " ",
) -> str:
    """A random model that draws nothing but the characters `says` and so does not end by itself."""
    vocabulary = byte_tokenizer()
    torch.manual_seed(0)
    model = GPT2(
        GPT2Config(
            vocab_size=vocabulary.vocab_size, n_positions=n_ctx, n_embd=32, n_layer=2, n_head=4
        )
    )
    shake(model, 0)
    with torch.no_grad():
        model.ln_f.weight[0], model.ln_f.bias[0] = 0, 1
        for id, piece in enumerate(vocabulary.token_bytes):
            is_type_row = id < 2
            drawn = is_type_row or (piece and piece.decode("latin1") in says)
            model.wte.weight[id, 0] = 0.0 if drawn else -1000.0
    pretrained.save_static(directory, model.config, vocabulary, task)
    pretrained.save_weights(directory, model)
    return str(directory)


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> str:
    return babbler(tmp_path_factory.mktemp("run") / "model")


class Terminal:
    """`python -m gptchat.chat` in a pseudo-terminal."""

    def __init__(self, *arguments: str, columns: int = 80):
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "gptchat.chat", *arguments],
            timeout=60,
            encoding="utf-8",
            dimensions=(24, columns),
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
        )
        self.child.delaybeforesend = None

    def expect(self, text: str) -> str:
        """What comes before `text`, which must come."""
        self.child.expect_exact(text)
        return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", self.child.before)

    def ask(self, line: str) -> str:
        """The answer to a line typed at the prompt that is there."""
        self.child.send(line + "\r")
        self.expect(LABEL)
        return self.expect(PROMPT).strip()

    def interrupt(self, expected: str | type[pexpect.EOF]) -> None:
        """Ctrl-C, which `expected` is to follow, and once more if nothing comes of it.

        CPython forgets a signal that comes just before readline waits for keys, until the next one.
        """
        for _ in range(4):
            self.child.sendintr()
            if self.child.expect_exact([expected, pexpect.TIMEOUT], timeout=10) == 0:
                return
        raise AssertionError(f"four times Ctrl-C, and never {expected}")

    def leave(self) -> int | None:
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


def test_a_conversation_in_a_terminal(bot):
    options = "--seed 1 --max-new-tokens 30 --temperature 0.8 --top-k 0 --top-p 0.9"
    terminal = Terminal("--model", bot, *options.split(), "--repetition-penalty", "1.1")
    terminal.expect(PROMPT)
    first = terminal.ask("hello")
    assert re.fullmatch("[a-z ]{25,30}", first)
    assert terminal.ask("hello") != first  # the turns are kept
    terminal.child.send("/reset\r")
    terminal.expect(PROMPT)
    # Up, up: the line before /reset; and it is a new conversation.
    assert terminal.ask("\x1b[A\x1b[A") == first

    for line, expected in (
        ("/help", "/set NAME VALUE"),
        ("/set", "max_new_tokens 30"),
        ("/nonsense", "no such command"),
        ("/set top_p 2", "top_p: found 2.0; wanted a number, 0 to 1"),
        ("/set tempo 1", "tempo: no such setting"),
        ("/set temperature warm", "invalid float value"),
        ("x" * 1100, "the last turn takes"),
    ):
        terminal.child.send(line + "\r")
        terminal.expect(expected)
        terminal.expect(PROMPT)

    terminal.child.send("/set max-new-tokens 900\r")
    terminal.expect(PROMPT)
    terminal.child.send("go on\r")
    terminal.expect(LABEL)
    terminal.child.expect("[a-z]{3}")  # it streams: this is there long before the end
    terminal.child.sendintr()
    assert len(terminal.expect(PROMPT)) < 800
    terminal.child.send("/set max_new_tokens 5\r")
    terminal.expect(PROMPT)
    assert len(terminal.ask("still there?")) <= 5
    terminal.child.send("half a line")
    terminal.expect("half a line")  # Ctrl-C drops keys not yet read, and readline then waits on
    terminal.interrupt("Ctrl-C again")
    terminal.expect(PROMPT)
    terminal.interrupt(pexpect.EOF)
    assert terminal.leave() == 0


def test_a_narrow_window(bot, monkeypatch, capsys):
    terminal = Terminal("--model", bot, "--seed", "1", "--max-new-tokens", "60", columns=20)
    terminal.expect(PROMPT)
    line = "a message that takes more than one line of this window"
    answer = terminal.ask(line)
    options = ("--model", bot, "--seed", 1, "--max-new-tokens", 60)
    assert len(answer) > 50
    assert answer == run(monkeypatch, capsys, *options, "--prompt", line).strip()
    terminal.child.sendeof()
    assert terminal.leave() == 0


def run(monkeypatch: Any, capsys: Any, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["chat", *map(str, arguments)])
    chat.main()
    return capsys.readouterr().out


def test_one_prompt(bot, monkeypatch, capsys):
    ask = ("--model", bot, "--prompt", "hello", "--max-new-tokens", 20)
    answers = [run(monkeypatch, capsys, *ask, "--seed", seed) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2] and re.fullmatch("[a-z ]{20}\n", answers[0])
    # Without a seed another one each time.
    assert run(monkeypatch, capsys, *ask) != run(monkeypatch, capsys, *ask)
    cut = run(monkeypatch, capsys, *ask, "--seed", 1, "--stop", answers[0][4:7])
    assert cut == answers[0][:4] + "\n"
    letter = answers[0].replace(" ", "")[0]
    assert letter not in run(monkeypatch, capsys, *ask, "--seed", 1, "--forbid", letter)
    options = ("--prompt", "[SEP]\udcff", "--max-new-tokens", 3)
    assert len(run(monkeypatch, capsys, *ask[:2], *options)) == 4


def request_of(generator: TextGenerator, turns: list[TextTurn], *options: str) -> Request:
    args = chat.parse_arguments(["--model", "x", *options])
    return chat.make_request(generator, chat.encode_turns(generator, turns), args)


def test_an_lm_has_no_context_to_pick_by(tmp_path, monkeypatch, capsys):
    lm = babbler(tmp_path / "lm", task="lm")
    with pytest.raises(UserError, match="pick mmi: found an LM; wanted a ChatLM"):
        chat.main(["--model", lm, "--prompt", "hello", "--pick", "mmi"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/set pick mmi\n/set\n")))
    chat.main(["--model", lm])
    printed = capsys.readouterr().out
    assert "error: pick mmi: found an LM" in printed and "pick first" in printed


def test_picking_by_mutual_information(bot, tmp_path, monkeypatch, capsys):
    settings = ["--seed", 1, "--max-new-tokens", 20, "--pick", "mmi"]
    ask = ["--model", bot, *settings]
    answer = run(monkeypatch, capsys, *ask, "--prompt", "hello").strip("\n")
    prompts = tmp_path / "prompts.tsv"
    prompts.write_text("hello\nhello\tthere\thow are you\n")
    run(monkeypatch, capsys, *ask, "--input", prompts, "--output", tmp_path / "answers.tsv")
    (first, second) = read_rows(tmp_path / "answers.tsv")
    assert first == ["hello", answer] and len(answer) == 20
    assert second[:3] == ["hello", "there", "how are you"] and len(second[3]) == 20
    others = [run(monkeypatch, capsys, *ask[:-1], pick, "--prompt", "hello") for pick in chat.PICKS]
    assert len(set(others)) > 1


def test_a_turn_that_was_picked_is_not_computed_again(bot):
    generator = load_generator(bot, 2 * chat.CANDIDATES, "float32", prefix_cache=True)
    turns = [(0, "hello there")]
    ask = ["--pick", "mmi", "--max-new-tokens", "20"]
    [answer] = generator.complete([request_of(generator, turns, *ask)], pick="mmi")
    turns += [(1, answer), (0, "and then?")]
    generator.engine.submit(request_of(generator, turns, *ask))
    cached = max(output.n_cached for output in generator.engine.step())
    assert cached >= len("hello there") + len(answer)


def test_the_median_of_five(bot):
    generator = load_generator(bot, chat.CANDIDATES, "float32")
    ask = ["--seed", "3", "--max-new-tokens", "30", "--pick", "median"]
    request = request_of(generator, [(0, "hello")], *ask)
    (candidates,) = generate(generator.engine, [request])
    texts = [generator.tokenizer.decode(candidate.ids).split(" ")[0] for candidate in candidates]
    *waiting, last = generator.stream([request], [" "])
    # so that Ctrl-C is seen between them
    assert waiting and all(piece == Piece(0, "", False) for piece in waiting)
    assert last.last and last.text == sorted(texts, key=len)[2]
    assert len(set(map(len, texts))) > 2
    assert generator.engine.idle


def test_an_unfinished_answer_frees_its_slot(bot):
    generator = load_generator(bot, 2, "float32")
    pieces = generator.stream([request_of(generator, [(0, "hello")])] * 3)
    next(pieces)
    assert generator.engine.live + generator.engine.queued == 3
    pieces.close()
    assert generator.engine.idle


def test_a_file_of_prompts(bot, tmp_path, monkeypatch, capsys):
    prompts, output = tmp_path / "prompts.tsv", tmp_path / "answers.tsv"
    rows = [
        ["hello"],
        ["hi", "hello", "a tab:\\t, a line\\nand more"],
        *(["the same"] for _ in range(30)),
    ]
    prompts.write_text("".join("\t".join(row) + "\n" for row in rows))
    common = ("--model", bot, "--max-new-tokens", 20, "--seed")
    run(monkeypatch, capsys, *common, 1, "--input", prompts, "--output", output)
    answered = read_rows(output)
    assert [row[:-1] for row in answered] == read_rows(prompts) and len(answered) == 32
    assert all(re.fullmatch("[a-z ]{20}", row[-1]) for row in answered)
    assert len({row[-1] for row in answered}) == 32  # each line draws its own noise
    alone = run(monkeypatch, capsys, *common, 1 + 31, "--prompt", "the same")
    assert alone == answered[-1][-1] + "\n"


@pytest.mark.parametrize("task", ["chatlm", "lm"])
def test_rows_longer_than_the_context_are_cut_at_their_front_with_one_warning(
    tmp_path, monkeypatch, capsys, task
):
    model = babbler(tmp_path / "model", task, 64)
    common = ("--model", model, "--seed", 1, "--max-new-tokens", 20)
    room = 64 - 20  # tokens of a prompt
    if task == "chatlm":
        room -= 1  # [SEP]
    long = "".join(chr(97 + i % 26) for i in range(200))
    fitting = long[-room:]
    answers, warnings = [], []
    for rows in (["hi", long, "older\t" + long, "hi"], ["hi", fitting, fitting, "hi"]):
        (tmp_path / "in.tsv").write_text("\n".join(rows) + "\n")
        files = ("--input", tmp_path / "in.tsv", "--output", tmp_path / "out.tsv")
        monkeypatch.setattr(sys, "argv", ["chat", *map(str, (*common, *files))])
        chat.main()
        answers.append([row[-1] for row in read_rows(tmp_path / "out.tsv")])
        warnings += re.findall("warning: .*", capsys.readouterr().err)
    assert answers[0] == answers[1]
    (warning,) = warnings  # of the first file
    assert "in.tsv:2: the first of 2 rows that are longer than the context" in warning


def test_a_jsonl_file_of_prompts(bot, tmp_path, monkeypatch, capsys):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    turns = [("system", "Be brief."), ("user", "日本"), ("assistant", "a\tb"), ("user", "hello")]
    openai = {"id": 7, "messages": [{"role": role, "content": text} for role, text in turns]}
    sharegpt = {"conversations": [{"from": "human", "value": "hello"}], "note": "\ud800"}
    lines = [json.dumps(openai, ensure_ascii=False), "", json.dumps(sharegpt)]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    common = ("--model", bot, "--max-new-tokens", 20, "--seed")
    run(monkeypatch, capsys, *common, 1, "--input", prompts, "--output", output)

    assert "日本" in output.read_text(encoding="utf-8")
    first, second = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    answers = [first["messages"].pop(), second["conversations"].pop()]
    assert [first, second] == [openai, sharegpt]
    assert answers[0]["role"] == "assistant" and re.fullmatch("[a-z ]{20}", answers[0]["content"])
    alone = run(monkeypatch, capsys, *common, 2, "--prompt", "hello").removesuffix("\n")
    assert answers[1] == {"from": "gpt", "value": alone}
    assert [len(dialogue) for dialogue in read_dialogues(output)] == [5, 2]  # it can be trained on


def test_an_lm_goes_on_with_the_text(tmp_path, monkeypatch, capsys):
    directory = babbler(tmp_path / "model", "lm", 64)
    for prompt in ("Once upon a time", ""):
        options = ("--model", directory, "--prompt", prompt, "--max-new-tokens", 12)
        assert re.fullmatch("[a-z ]{12}\n", run(monkeypatch, capsys, *options))


def test_what_a_terminal_would_obey_is_not_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    chat.say("a\x1b[2Jb\x9b\x07\r\x00c\td\n日本")
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffd\ufffd\ufffd\ufffdc\td\n日本"


@pytest.mark.parametrize(
    "name", [field.name for field in fields(Sampling) if field.name not in OTHER_FIELDS]
)
def test_every_sampling_setting_is_an_option_and_a_name_of_set(bot, capsys, name):
    generator = load_generator(bot, 1, "float32")
    settings = chat.parse_arguments(["--model", bot])
    default = getattr(chat.make_sampling(generator, settings), name)
    value = 1 if default != 1 else type(default)(0.5)  # in the range of all, and not the default

    option = "--" + name.replace("_", "-")
    chosen = chat.parse_arguments(["--model", bot, option, str(value)])
    assert getattr(chat.make_sampling(generator, chosen), name) == value

    conversation = chat.Conversation(generator, settings)
    conversation.obey(f"/set {name} {value}")
    assert getattr(chat.make_sampling(generator, conversation.args), name) == value
    conversation.obey("/set")
    assert f"\n{name} {getattr(chosen, name)}\n" in "\n" + capsys.readouterr().out


def test_a_wrong_setting_changes_nothing_and_an_empty_list_clears_it(bot):
    settings = chat.parse_arguments(["--model", bot, "--stop", "a", "--stop", "b"])
    conversation = chat.Conversation(load_generator(bot, 1, "float32"), settings)
    for wrong in ("/set top_p 2", "/set top_p", "/set nonsense 1", "/set pick last"):
        with pytest.raises(UserError):
            conversation.obey(wrong)
        assert conversation.args == settings
    conversation.obey("/set stop c d")  # replaces both
    assert conversation.args.stop == ["c d"]
    conversation.obey(r"/set stop \n")
    assert conversation.args.stop == ["\n"]
    conversation.obey("/set stop")
    conversation.reply("hello")
    assert len(conversation.turns[-1][1]) > 20


def test_a_stop_may_be_a_line_break_a_tab_or_a_backslash():
    options = ["--model", "x", "--stop", r"\n", "--stop", r"a\tb", "--stop", r"\\n\x"]
    assert chat.parse_arguments(options).stop == ["\n", "a\tb", "\\n\\x"]


def test_lines_of_a_pipe_are_a_conversation(bot):
    done = subprocess.run(
        [sys.executable, "-m", "gptchat", "chat", "--model", bot, "--max-new-tokens", "5"],
        input="hello\n\n/nonsense\n/quit\nnever read\n",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch("[a-z ]{5}\nerror: /nonsense: no such command; .*\n", done.stdout)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([], "wanted either --model DIR"),
        (["--model", "nowhere"], "no such directory"),
        (["--model", "BOT", "--temperature", "hot"], "invalid float value"),
        (["--model", "BOT", "--dtype", "int3"], "invalid choice"),
        (["--model", "BOT", "--temperature", "-1"], "temperature: found -1.0; wanted"),
        (["--model", "BOT", "--prompt", "x" * 2000], "the last turn takes"),
        (["--model", "BOT", "--input", "prompts.tsv"], "--input and --output together"),
        (
            ["--model", "BOT", "--input", "nothing.tsv", "--output", "OUT"],
            "nothing.tsv: no such file, named by --input",
        ),
        (["--model", "BOT", "--input", "FOLDER", "--output", "OUT"], "is a folder"),
        (
            ["--model", "BOT", "--input", "BLANK", "--output", "OUT"],
            "blank.tsv:2: found no text in column 1",
        ),
        (
            ["--model", "BOT", "--input", "BLANK", "--output", "answers.jsonl"],
            "found another format than that of --input",
        ),
    ],
)
def test_wrong_use_is_one_line(bot, tmp_path, monkeypatch, capsys, arguments, reason):
    (tmp_path / "blank.tsv").write_text("hello\n  \n")
    places = {"BOT": bot, "FOLDER": str(tmp_path)}
    places |= {name: str(tmp_path / f"{name.lower()}.tsv") for name in ("BLANK", "OUT")}
    monkeypatch.setattr(
        sys, "argv", ["chat", *(places.get(argument, argument) for argument in arguments)]
    )
    with pytest.raises(SystemExit) as stopped:
        cli(chat.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and reason in line
    assert not list(tmp_path.glob("out.*"))

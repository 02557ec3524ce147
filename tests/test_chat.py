"""The chat in a real terminal, and answers to one prompt and to files."""

import os
import re
import string
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch
from hf_models import byte_tokenizer, shake

from gptchat import chat
from gptchat.console import cli
from gptchat.data.dialogue import read_rows
from gptchat.inference.engine import generate
from gptchat.inference.generate import Piece, load_generator
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2, GPT2Config

torch.set_num_threads(1)

PROMPT, LABEL = "you> ", "bot> "


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
        model.wte.weight[:, 0] = torch.tensor(
            [
                0.0 if i < 2 or (piece and piece.decode("latin1") in says) else -1000.0
                for i, piece in enumerate(vocabulary.token_bytes)
            ]
        )  # 0, 1: type rows
    pretrained.save_static(directory, model.config, vocabulary, task)
    pretrained.save_weights(directory, model)
    return str(directory)


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> str:
    return babbler(tmp_path_factory.mktemp("run") / "model")


class Terminal:
    """`python -m gptchat.chat` in a pseudo-terminal."""

    def __init__(self, *arguments: str, columns: int = 80, **environment: str):
        clean = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {
            "OMP_NUM_THREADS": "1"
        }
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "gptchat.chat", *arguments],
            timeout=60,
            encoding="utf-8",
            dimensions=(24, columns),
            env={**clean, "TERM": "xterm", **environment},
        )
        self.child.delaybeforesend = None

    def expect(self, text: str) -> str:
        """What comes before `text`, which must come."""
        self.child.expect_exact(text)
        return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", self.child.before)

    def ask(self, line: str) -> str:
        """The answer to a line typed at the prompt that is there."""
        self.child.send(line + "\r")
        self.expect(LABEL.strip())
        return self.expect(PROMPT.strip()).strip()

    def interrupt(self, told: str | type[pexpect.EOF]) -> None:
        """Ctrl-C, and once more if nothing comes of it: CPython forgets a signal that comes just before readline waits
        for keys, until the next one."""
        for _ in range(4):
            self.child.sendintr()
            if self.child.expect_exact([told, pexpect.TIMEOUT], timeout=10) == 0:
                return
        raise AssertionError(f"four times Ctrl-C, and never {told}")

    def leave(self) -> int | None:
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


def test_a_conversation_in_a_terminal(bot):
    terminal = Terminal(
        "--model",
        bot,
        "--seed",
        "1",
        "--max-new-tokens",
        "30",
        "--temperature",
        "0.8",
        "--top-k",
        "0",
        "--top-p",
        "0.9",
        "--repetition-penalty",
        "1.1",
    )
    terminal.expect(PROMPT.strip())
    assert "\x1b[1;36m" in terminal.child.before  # coloured
    first = terminal.ask("hello")
    assert re.fullmatch("[a-z ]{25,30}", first)
    assert terminal.ask("hello") != first  # the turns are kept
    terminal.child.send("/reset\r")
    terminal.expect(PROMPT.strip())
    assert (
        terminal.ask("\x1b[A\x1b[A") == first
    )  # up, up: the line before /reset; and it is a new conversation

    for line, told in (
        ("/help", "/set NAME VALUE"),
        ("/set", "max_new_tokens 30"),
        ("/nonsense", "no such command"),
        ("/set top_p 2", "top_p is 2.0, wanted from 0 to 1"),
        ("/set tempo 1", "unrecognized"),
        ("/set temperature warm", "invalid float value"),
        ("x" * 1100, "the last turn takes"),
    ):
        terminal.child.send(line + "\r")
        terminal.expect(told)
        terminal.expect(PROMPT.strip())

    terminal.child.send("/set max-new-tokens 900\r")
    terminal.expect(PROMPT.strip())
    terminal.child.send("go on\r")
    terminal.expect(LABEL.strip())
    terminal.child.expect("[a-z]{3}")  # it streams: this is there long before the end
    terminal.child.sendintr()
    assert len(terminal.expect(PROMPT.strip())) < 800
    terminal.child.send("/set max_new_tokens 5\r")
    terminal.expect(PROMPT.strip())
    assert len(terminal.ask("still there?")) <= 5
    terminal.child.send("half a line")
    terminal.interrupt("Ctrl-C again")
    terminal.expect(PROMPT.strip())
    terminal.interrupt(pexpect.EOF)
    assert terminal.leave() == 0
    assert "go on" in (Path(bot).parent / "chat_history").read_text()


def test_a_narrow_window_without_colour(bot, monkeypatch, capsys):
    (Path(bot).parent / "chat_history").write_text("from another day\n")
    terminal = Terminal(
        "--model", bot, "--seed", "1", "--max-new-tokens", "60", columns=20, NO_COLOR="1"
    )
    seen = terminal.expect(PROMPT.strip()) + terminal.child.before
    line = "a message that takes more than one line of this window"
    answer = terminal.ask(line)
    assert (
        len(answer) > 50
        and answer
        == run(
            monkeypatch,
            capsys,
            "--model",
            bot,
            "--seed",
            1,
            "--max-new-tokens",
            60,
            "--prompt",
            line,
        ).strip()
    )
    terminal.child.send("\x1b[A\x1b[A\r")  # up, up: a line of an earlier session
    terminal.expect(LABEL.strip())
    terminal.expect(PROMPT.strip())
    terminal.child.sendeof()
    assert terminal.leave() == 0
    assert "\x1b[1;36m" not in seen
    assert (Path(bot).parent / "chat_history").read_text().splitlines()[-1] == "from another day"


def run(monkeypatch: Any, capsys: Any, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["chat", *map(str, arguments)])
    chat.main()
    return capsys.readouterr().out


def test_one_prompt(bot, monkeypatch, capsys):
    ask = ("--model", bot, "--prompt", "hello", "--max-new-tokens", 20)
    answers = [run(monkeypatch, capsys, *ask, "--seed", seed) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2] and re.fullmatch("[a-z ]{20}\n", answers[0])
    assert run(monkeypatch, capsys, *ask) != run(
        monkeypatch, capsys, *ask
    )  # without a seed another one each time
    assert (
        run(monkeypatch, capsys, *ask, "--seed", 1, "--stop", answers[0][4:7])
        == answers[0][:4] + "\n"
    )
    letter = answers[0].replace(" ", "")[0]
    assert letter not in run(monkeypatch, capsys, *ask, "--seed", 1, "--forbid", letter)
    assert (
        len(run(monkeypatch, capsys, *ask[:2], "--prompt", "[SEP]\udcff", "--max-new-tokens", 3))
        == 4
    )


def test_the_median_of_five(bot):
    generator = load_generator(bot, chat.CANDIDATES, "float32")
    settings = chat.settings_parser().parse_args(
        ["--seed", "1", "--max-new-tokens", "30", "--stop", " "]
    )
    request = replace(chat.make_request(generator, [(0, "hello")], settings), n=5)
    (candidates,) = generate(generator.engine, [request])
    texts = [generator.tokenizer.decode(candidate.ids).split(" ")[0] for candidate in candidates]
    settings.pick = "median"
    *waiting, last = generator.stream(
        [chat.make_request(generator, [(0, "hello")], settings)], settings.stop
    )
    # so that Ctrl-C is seen between them
    assert waiting and all(piece == Piece(0, "", False) for piece in waiting)
    assert last.last and last.text == sorted(texts, key=len)[2]
    assert len(set(map(len, texts))) > 2
    assert generator.engine.idle


def test_an_unfinished_answer_frees_its_slot(bot):
    generator = load_generator(bot, 2, "float32")
    settings = chat.settings_parser().parse_args([])
    pieces = generator.stream([chat.make_request(generator, [(0, "hello")], settings)] * 3)
    next(pieces)
    assert generator.engine.live + generator.engine.queued == 3
    pieces.close()
    assert generator.engine.idle


def test_a_file_of_prompts(bot, tmp_path, monkeypatch, capsys):
    prompts, output = tmp_path / "prompts.tsv", tmp_path / "answers.tsv"
    rows = [
        ["hello"],
        ["hi", "hello", "a tab:\\t, a line\\nand more"],
        *([f"number {i}"] for i in range(30)),
    ]
    prompts.write_text("".join("\t".join(row) + "\n" for row in rows))
    common = ("--model", bot, "--seed", 1, "--max-new-tokens", 20)
    run(monkeypatch, capsys, *common, "--input", prompts, "--output", output)
    answered = list(read_rows(output))
    assert [row[:-1] for row in answered] == list(read_rows(prompts, 1)) and len(answered) == 32
    assert all(re.fullmatch("[a-z ]{20}", row[-1]) for row in answered)
    assert run(monkeypatch, capsys, *common, "--prompt", "number 29") == answered[-1][-1] + "\n"


def test_an_lm_goes_on_with_the_text(tmp_path, monkeypatch, capsys):
    directory = babbler(tmp_path / "model", "lm", 64)
    for prompt in ("Once upon a time", ""):
        assert re.fullmatch(
            "[a-z ]{12}\n",
            run(
                monkeypatch,
                capsys,
                "--model",
                directory,
                "--prompt",
                prompt,
                "--max-new-tokens",
                12,
            ),
        )


def test_what_a_terminal_would_obey_is_not_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    chat.say("a\x1b[2Jb\x9b\x07\r\x00c\td\n日本")
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffd\ufffd\ufffd\ufffdc\td\n日本"


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "required: --model"),
        (["--model", "nowhere"], "no such directory"),
        (["--model", "BOT", "--temperature", "hot"], "invalid float value"),
        (["--model", "BOT", "--dtype", "int3"], "invalid choice"),
        (["--model", "BOT", "--temperature", "-1"], "temperature is -1.0, wanted"),
        (["--model", "BOT", "--prompt", "x" * 2000], "the last turn takes"),
        (["--model", "BOT", "--input", "prompts.tsv"], "--input and --output together"),
        (
            ["--model", "BOT", "--input", "nothing.tsv", "--output", "OUT"],
            "nothing.tsv: found no such file",
        ),
        (
            ["--model", "BOT", "--input", "LONG", "--output", "OUT"],
            "long.tsv: row 2: prompt: the last turn takes",
        ),
    ],
)
def test_wrong_use_is_one_line(bot, tmp_path, monkeypatch, capsys, arguments, told):
    (tmp_path / "long.tsv").write_text(f"hello\n{'x' * 2000}\n")
    places = {"BOT": bot, "LONG": str(tmp_path / "long.tsv"), "OUT": str(tmp_path / "out.tsv")}
    monkeypatch.setattr(
        sys, "argv", ["chat", *(places.get(argument, argument) for argument in arguments)]
    )
    with pytest.raises(SystemExit) as stopped:
        cli(chat.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and told in line
    assert not (tmp_path / "out.tsv").exists()

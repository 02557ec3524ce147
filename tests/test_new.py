"""`gptchat new`: configs for own data that load, are sized by stated rules, overwrite nothing."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptchat import new
from gptchat.config import Config, load_config, load_run_config
from gptchat.console import UserError
from gptchat.data.check import check
from gptchat.data.dialogue_files import read_prompts
from gptchat.model.gpt2 import GPT2Config
from gptchat.new import sizing
from gptchat.training.start import check_size

SPEED = 3e11  # FLOP/s, about that of two cores
BOTH = ("--text", "mine/*.txt", "--chat", "talks/*.tsv")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with text and dialogues, on a machine of known speed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sizing, "measure", lambda recipe: SPEED)
    (tmp_path / "mine").mkdir()
    (tmp_path / "talks").mkdir()
    text = [f"Paragraph {i} of a text of my own." * 5 for i in range(6000)]
    (tmp_path / "mine/a.txt").write_text("\n\n".join(text))
    rows = [f"Question {i}?\tThe answer is {i}.\n" for i in range(5000)]
    (tmp_path / "talks/a.tsv").write_text("".join(rows))
    return tmp_path


def run(*arguments: str) -> None:
    new.main(["bard", *arguments])


def config_of(task: str) -> Config:
    return load_run_config(f"configs/bard/{task}.toml")


def prompts() -> list[str]:
    return [turns[0][1] for _, turns, _ in read_prompts("configs/bard/prompts.tsv")]


def write_messages(name: str, dialogues: list[list[str]], system: bool = False) -> str:
    """A JSONL file in which user and assistant take turns."""
    lines = []
    for texts in dialogues:
        messages = [{"role": "system", "content": "Be kind."}] if system else []
        for number, text in enumerate(texts):
            messages.append({"role": ("user", "assistant")[number % 2], "content": text})
        lines.append(json.dumps({"messages": messages}))
    Path(name).write_text("\n".join(lines))
    return name


def test_both_configs_load_name_the_files_and_say_what_is_next(folder: Path, capsys: Any) -> None:
    run(*BOTH)
    lm, chatlm = config_of("lm"), config_of("chatlm")
    assert lm.data.train == ("mine/*.txt",) and chatlm.data.train == ("talks/*.tsv",)
    assert lm.tokenizer.files == ("mine/*.txt", "talks/*.tsv")
    assert chatlm.init_from == f"{lm.run}/model" and lm.run == "out/bard/lm"
    assert lm.data.held_out > 0 and chatlm.data.held_out > 0
    check_size(chatlm, GPT2Config.of(lm.model, lm.tokenizer.vocab_size))
    assert capsys.readouterr().out.splitlines() == [
        "wrote configs/bard/lm.toml",
        "wrote configs/bard/chatlm.toml",
        "wrote configs/bard/prompts.tsv",
        "next:",
        "  gptchat check --config configs/bard/lm.toml",
        "  gptchat check --config configs/bard/chatlm.toml",
        "  make tokenizer lm chatlm CONFIGS=configs/bard",
    ]


def test_every_number_has_its_reason_beside_it(folder: Path) -> None:
    run(*BOTH)
    text = Path("configs/bard/lm.toml").read_text()
    for key in ("vocab_size", "held_out", "document", "num_steps", "batch_size", "eval_interval"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"{key} = ")]
        assert "  # " in line


def test_text_alone_gives_an_lm_alone(folder: Path) -> None:
    run("--text", "mine/*.txt")
    assert [path.name for path in Path("configs/bard").iterdir()] == ["lm.toml"]


def test_dialogues_alone_give_a_chatlm_from_new_weights(folder: Path) -> None:
    run("--chat", "talks/*.tsv")
    assert not Path("configs/bard/lm.toml").exists()
    config = config_of("chatlm")
    assert config.init_from == "" and config.data.targets == "all" and config.model.n_embd > 0
    assert config.tokenizer.files == ("talks/*.tsv",)
    lm = load_config(str(new.DEFAULTS / "lm.toml")).train
    for key in ("learning_rate", "embedding_learning_rate", "muon_learning_rate"):
        assert getattr(config.train, key) == getattr(lm, key)  # not those of fine-tuning


@pytest.mark.parametrize("name", ["chatlm.toml", "prompts.tsv"])
def test_what_is_there_is_never_overwritten(folder: Path, name: str) -> None:
    Path("configs/bard").mkdir(parents=True)
    Path("configs/bard", name).write_text("mine")
    with pytest.raises(UserError, match=f"configs/bard/{name}: is there already"):
        run(*BOTH)
    assert [path.name for path in Path("configs/bard").iterdir()] == [name]


def test_prompts_are_short_first_turns_from_all_files_in_their_order(folder: Path) -> None:
    for name in ("b", "c"):
        rows = [f"Question {name}{i}?\tYes.\n" for i in range(3000)]
        Path(f"talks/{name}.tsv").write_text("".join(["long " * 17 + "\tNo.\n"] * 100 + rows))
    run(*BOTH)
    found = prompts()
    assert len(set(found)) == 10 and max(map(len, found)) <= 80
    order = [re.sub(r"\d+\?", "", text) for text in found]
    assert order == sorted(order) and len(set(order)) == 3


def test_prompts_are_what_people_say_first_once_each_and_escaped(folder: Path) -> None:
    dialogues = [[f"A line\nand\tanother {i % 3}.", "Yes."] for i in range(100)]
    run("--chat", write_messages("some.jsonl", dialogues, system=True))
    assert prompts() == [f"A line\nand\tanother {i}." for i in range(3)]


def test_rows_that_repeat_a_conversation_give_their_last_turn_also_with_roles(folder: Path) -> None:
    talks = [[f"Turn {turn} of {talk}." for turn in range(12)] for talk in range(30)]
    so_far = [turns[:length] for turns in talks for length in range(2, 13, 2)]
    run("--text", "mine/*.txt", "--chat", write_messages("log.jsonl", so_far, system=True))
    assert config_of("chatlm").data.targets == "response"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bard"], "wanted --text FILES, --chat FILES or both"),
        (["../x", *BOTH], "NAME: found '../x'; wanted letters"),
        (["bard", "--text", "none/*.txt"], "none/.*: no such file"),
        (["bard", "--text", "small.txt"], "small.txt: found 3 documents; wanted 40 or more"),
        (["bard", "--chat", "mine/a.txt"], "mine/a.txt:1: found one column"),
        (["bard", "--text", "\udcff.txt"], "FILES: found .* which is not UTF-8"),
        (["bard", *BOTH, "--minutes", "0"], "invalid positive value: '0'"),
    ],
)
def test_wrong_use_is_one_line(folder: Path, arguments: list[str], message: str) -> None:
    Path("small.txt").write_text("One\ntwo\nthree.\n")
    with pytest.raises(UserError, match=message):
        new.main(arguments)
    assert not Path("configs").exists()


def plan(minutes: float, n_copies: int = 1) -> Config:
    text = Path("mine/a.txt").read_text()
    Path("mine/b.txt").write_text("\n\n".join([text] * n_copies))
    contents = new.plan_files("x", ["mine/b.txt"], [], minutes)
    Path("x.toml").write_text(contents["lm.toml"])
    return load_config("x.toml")


def test_more_time_gives_more_steps_or_a_larger_model(folder: Path) -> None:
    small, large = plan(1, 4), plan(60, 4)
    assert small.model.n_embd < large.model.n_embd
    assert small.train.num_steps * small.model.n_embd < large.train.num_steps * large.model.n_embd


def test_little_data_is_read_ten_times_at_most_with_dropout_and_patience(folder: Path) -> None:
    config = plan(600)
    n_tokens = sizing.count_tokens(check(config), config.tokenizer.vocab_size)
    n_tokens *= 1 - 2 * config.data.held_out
    seen = config.train.num_steps * config.train.batch_size * config.model.n_ctx
    assert 0.9 * sizing.MAX_EPOCHS < seen / n_tokens <= sizing.MAX_EPOCHS
    assert config.model.dropout == 0.1 and config.train.patience == 3


@pytest.mark.parametrize("rows", [50, 50_000])
def test_the_plans_of_both_never_take_more_than_the_minutes(folder: Path, rows: int) -> None:
    lm, chatlm = (load_config(str(new.DEFAULTS / f"{task}.toml")) for task in ("lm", "chatlm"))
    text, _ = sizing.survey("lm", ["mine/*.txt"], 256)
    text = replace(text, text_bytes=10 * text.text_bytes)
    Path("talks/a.tsv").write_text("Who is there at this hour?\tIt is only me.\n" * rows)
    reports = {"lm": text, "chatlm": sizing.survey("chatlm", ["talks/*.tsv"], 256)[0]}
    train = {"lm": lm.train, "chatlm": chatlm.train}
    for minutes in (2, 15):
        plans = sizing.plan_all(reports, lm, train, minutes, SPEED)
        assert plans["lm"].model == plans["chatlm"].model
        seconds = plans["lm"].seconds + plans["chatlm"].seconds
        assert 0.5 < seconds / (60 * minutes * sizing.STEPS_SHARE) <= 1 + 1e-9


def test_text_without_blank_lines_is_cut_into_lines(folder: Path) -> None:
    Path("lines.txt").write_text("".join(f"Line {i} stands alone here.\n" for i in range(500)))
    contents = new.plan_files("x", ["lines.txt"], [], 1)
    assert 'document = "line"' in contents["lm.toml"]


def test_long_dialogues_get_a_longer_context_and_fewer_rows(folder: Path) -> None:
    dialogues = [[f"{i} " + "long " * 400, "Yes."] for i in range(200)]
    run("--text", "mine/*.txt", "--chat", write_messages("long.jsonl", dialogues))
    default, config = load_config(str(new.DEFAULTS / "lm.toml")), config_of("lm")
    assert config.model.n_ctx == 4 * default.model.n_ctx
    assert config.train.batch_size == default.train.batch_size // 4


@pytest.mark.parametrize("has_lm, targets", [(True, "responder"), (False, "turns")])
def test_long_conversations_that_lose_nothing_leave_the_context_as_it_is(
    folder: Path, has_lm: bool, targets: str
) -> None:
    text = ("--text", "mine/*.txt") if has_lm else ()
    talks = [
        [f"Turn {turn} of {talk}: " + f"some words {turn} " * 6 for turn in range(30)]
        for talk in range(100)  # of about 600 tokens each
    ]
    run(*text, "--chat", write_messages("whole.jsonl", talks))
    config = config_of("chatlm")
    assert (
        config.data.targets == targets
        and config_of("lm" if has_lm else "chatlm").model.n_ctx == 256
    )
    report = check(config)
    assert report.long_rows == 100 and report.cut_rows == 0


def test_the_speed_that_is_measured_is_that_of_the_default_model() -> None:
    recipe = load_config(
        str(new.DEFAULTS / "lm.toml"),
        ["model.n_layer=1", "model.n_embd=96", "train.batch_size=1", "tokenizer.vocab_size=300"],
    )
    assert 1e6 < sizing.measure(recipe) < 1e15

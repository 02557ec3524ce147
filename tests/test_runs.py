"""What a run logs beside its losses, its model card, `gptchat runs` and `gptchat plot`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import config_of

from gptchat import evaluate, plot, runs
from gptchat.console import UserError
from gptchat.train import Run
from gptchat.training import model_card
from gptchat.training.distributed import World
from gptchat.training.run_log import SpeedLog, find_runs, read_entries, read_run

SHORT = ("train.num_steps=20", "train.eval_interval=10", "train.log_interval=4")
PNG, SVG = b"\x89PNG", b"<?xml"


def write_run(folder: Path, task: str, losses: list[float], **changes: Any) -> Path:
    """A folder as `gptchat train` leaves it: an evaluation every ten steps, a minute apart."""
    (folder / "model").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"task": task} | changes))
    (folder / "model/config.json").write_text(json.dumps({"n_layer": 2, "n_embd": 32}))
    log, speed = [], []
    for number, loss in enumerate(losses, 1):
        place = {"step": 10 * number, "kind": "valid"}
        train = {"step": 10 * number, "kind": "train"}
        tokens = {"tokens": 1000 * number}
        log += [train | tokens | {"loss": loss + 0.5}]
        log += [place | tokens | {"loss": loss, "bits_per_byte": loss / 2}]
        speed += [train | {"minutes": number, "tokens_per_second": 20.0 + number}]
        speed += [place | {"minutes": number + 0.5}]
    for name, entries in (("log.jsonl", log), ("speed.jsonl", speed)):
        (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


@pytest.fixture(scope="module")
def trained(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A ChatLM's run that was stopped after ten steps, by a signal, and went on to twenty."""
    folder = tmp_path_factory.mktemp("runs") / "chat"
    first = Run(config_of(small, "chatlm", folder, *SHORT), World("cpu"))
    step = first.step

    def stop_at_ten(micro_batches: list) -> Any:
        first.signalled = first.state.step == 9
        return step(micro_batches)

    first.step = stop_at_ten  # type: ignore[method-assign]
    first.train()
    assert first.stopped and first.lock is not None
    first.lock.close()
    second = Run(config_of(small, "chatlm", folder, *SHORT), World("cpu"))
    assert second.state.step == 10
    second.train()
    return second


# --- the logs


def test_both_logs_of_a_resumed_run_have_the_same_lines_and_count_on(trained: Run) -> None:
    log, speed = (read_entries(trained.folder / f"{name}.jsonl") for name in ("log", "speed"))
    places = [(entry["step"], entry["kind"]) for entry in log]
    assert places == [(entry["step"], entry["kind"]) for entry in speed]
    assert [step for step, kind in places if kind == "train"] == [4, 8, 12, 16, 20]
    minutes = [entry["minutes"] for entry in speed]
    assert minutes == sorted(minutes) and minutes[0] > 0
    rates = {"tokens_per_second", "target_tokens_per_second", "tflops", "mfu", "peak_memory_gb"}
    assert all(rates <= entry.keys() for entry in speed if entry["kind"] == "train")


def test_tokens_of_a_resumed_run_are_those_of_all_its_batches(trained: Run) -> None:
    per_step = [trained.train_batches.micro_batch(number).n_tokens for number in range(20)]
    for entry in read_entries(trained.folder / "log.jsonl"):
        assert entry["tokens"] == sum(per_step[: entry["step"]])


def test_steps_that_were_lost_leave_the_speed_log(tmp_path: Path) -> None:
    write_run(tmp_path, "lm", [3.0, 2.0, 1.0])
    with open(tmp_path / "speed.jsonl", "a") as file:
        file.write('{"step": 40, "ki')  # its process was killed
    log = SpeedLog(tmp_path, 20)
    log.write(21, "train", {"mfu": 0.5})
    log.close()
    entries = read_entries(tmp_path / "speed.jsonl")
    assert [entry["step"] for entry in entries] == [10, 10, 20, 20, 21]
    assert entries[-1]["minutes"] == pytest.approx(2.5, abs=0.1) and entries[-1]["mfu"] == 0.5


def test_a_line_that_is_no_logs_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, "lm", [3.0])
    (tmp_path / "log.jsonl").write_text('{"step": 1, "kind": "train"}\nnonsense\n')
    with pytest.raises(UserError, match="log.jsonl:2: no line of a training log"):
        read_run(tmp_path)


def test_tensorboard_has_the_config_and_the_figures_by_which_runs_are_compared(
    trained: Run,
) -> None:
    board = EventAccumulator(str(trained.folder / "tensorboard")).Reload()
    assert {"train/mfu", "train/peak_memory_gb", "train/grad_norm", "valid/loss"} <= set(
        board.Tags()["scalars"]
    )
    assert {"config/text_summary", "samples/0/text_summary"} <= set(board.Tags()["tensors"])
    assert "train.learning_rate = 0.003" in str(board.Tensors("config/text_summary")[0])
    start = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"train.learning_rate" in start and b"model.n_embd" in start


# --- the model card


def test_the_card_describes_the_model_that_was_saved(trained: Run) -> None:
    card = ModelCard.load(trained.model_dir / "README.md")
    assert card.data.library_name == "transformers" and "conversational" in card.data.tags
    assert card.data.pipeline_tag == "text-generation"
    best = read_run(trained.folder).best()
    assert best is not None and best["loss"] == trained.state.best_loss
    rows = [line for line in card.text.splitlines() if line.startswith("| ")]
    assert rows[-1].startswith(f"| {best['step']} | {best['tokens']:,} | {best['loss']:.4f} |")
    n_parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    assert f"{n_parameters:,} parameters: 2 layers of width 32" in card.text
    assert "train.learning_rate = 0.003" in card.text and "chatlm/train.tsv`" in card.text
    assert sum(line.count(" -> ") for line in card.text.splitlines()) >= 3


@pytest.mark.slow
def test_evaluation_adds_its_figures_to_the_card_once(
    small: Path, trained: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained.model_dir / "README.md"
    before = path.read_text()
    config = ["--config", str(small / "chatlm.toml"), f"run={trained.folder}"]
    evaluate.main(config)
    added = path.read_text()
    assert added.startswith(before) and added.count("## Evaluation") == 1
    printed = capsys.readouterr().out
    for name in ("perplexity", "bits per byte", "distinct 2"):
        assert name in printed and f" {name} |" in added
    evaluate.main(config)
    assert path.read_text() == added


def test_a_run_does_not_fail_for_want_of_a_card(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model/README.md").mkdir(parents=True)
    settings = ("train.num_steps=2", "train.eval_interval=2")
    one = Run(config_of(small, "lm", tmp_path, *settings), World("cpu"))
    one.train()
    assert one.state.step == 2 and (tmp_path / "model/model.safetensors").exists()
    assert "warning: no model card: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "values, bars",
    [([1.0, 2.0, 3.0], "▁▅█"), ([2.0, 2.0], "▁▁"), ([0.0, 7.0, 3.5], "▁█▅")],
)
def test_a_sparkline_goes_from_the_lowest_to_the_highest_bar(
    values: list[float], bars: str
) -> None:
    assert model_card.sparkline(values) == bars


def test_thinned_out_values_end_with_the_last() -> None:
    for length in (0, 1, 9, 10, 11, 25, 1000):
        kept = model_card.thin_out(range(length), 10)
        assert len(kept) <= 10 and kept[-1:] == list(range(length))[-1:]
    assert model_card.thin_out(range(10), 10) == list(range(10))


# --- gptchat runs, gptchat plot


@pytest.fixture
def two_runs(tmp_path: Path) -> Path:
    write_run(tmp_path / "out/lm", "lm", [4.0, 3.0, 3.5])
    write_run(tmp_path / "out/large/chat", "chatlm", [5.0])
    (tmp_path / "out/tokenizer").mkdir()
    (tmp_path / "out/picture.png").write_bytes(PNG)
    return tmp_path / "out"


def test_runs_are_listed_with_the_figures_of_their_best_models(
    two_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.main([str(two_runs)])
    header, chat, lm = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header[:3] == ["run", "task", "size"] and header[-2:] == ["loss", "bits/byte"]
    assert lm[1:] == "lm 2 x 32 30 3,000 3.5 22 20 3.0000 1.5000".split()
    assert chat[1:] == "chatlm 2 x 32 10 1,000 1.5 21 10 5.0000 2.5000".split()


def test_a_run_that_has_logged_nothing_yet_is_listed(tmp_path: Path, capsys) -> None:
    write_run(tmp_path / "new", "lm", [])
    runs.main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[1].split()[1:] == ["lm", "2", "x", "32"]


def test_runs_are_listed_without_torch(two_runs: Path) -> None:
    code = f"import sys; from gptchat import runs; runs.main([{str(two_runs)!r}])\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("content", ["[]", "{}", "no JSON"])
def test_a_config_that_is_no_runs_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "log.jsonl").write_text("")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json: "):
        read_run(tmp_path)


def test_a_folder_without_runs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no log.jsonl; wanted folders that `gptchat train`"):
        find_runs([tmp_path])
    with pytest.raises(UserError, match="none: no such folder"):
        find_runs([tmp_path / "none"])


@pytest.mark.parametrize("over", ["steps", "tokens", "minutes"])
@pytest.mark.parametrize("figure", ["loss", "bits_per_byte", "tokens_per_second"])
def test_curves_are_the_logged_figures(two_runs: Path, over: str, figure: str) -> None:
    pytest.importorskip("matplotlib")
    log = read_run(two_runs / "lm")
    x_key = plot.AXES[over][0]
    kind = "train" if figure == "tokens_per_second" else "valid"
    x, y = plot.curve(log.of_kind(kind), x_key, figure)
    assert x == {"steps": [10, 20, 30], "tokens": [1000, 2000, 3000]}.get(
        over, [1, 2, 3] if kind == "train" else [1.5, 2.5, 3.5]
    )
    wanted = {"loss": [4.0, 3.0, 3.5], "bits_per_byte": [2.0, 1.5, 1.75]}
    assert y == wanted.get(figure, [21.0, 22.0, 23.0])


@pytest.mark.parametrize("name, start", [("runs.png", PNG), ("runs.svg", SVG)])
def test_a_picture_of_all_runs_is_drawn_whatever_else_the_pattern_names(
    two_runs: Path, tmp_path: Path, name: str, start: bytes
) -> None:
    pytest.importorskip("matplotlib")
    plot.main([*map(str, two_runs.glob("*")), "--to", str(tmp_path / name)])
    picture = (tmp_path / name).read_bytes()
    assert picture.startswith(start)
    if name.endswith(".svg"):
        assert picture.count(b"<!-- ") > 5  # texts: labels of axes, ticks and runs


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--to", "x.gif"], "--to x.gif: wanted a name that ends in .png or .svg"),
        (["--figure", "mfu"], "found no mfu with steps; wanted a run that has logged some"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(two_runs: Path, arguments: list[str], told: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=told):
        plot.main([str(two_runs), *arguments])


def test_without_matplotlib_a_line_says_what_to_install(
    two_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="found no package matplotlib; wanted: python -m pip"):
        plot.main([str(two_runs)])

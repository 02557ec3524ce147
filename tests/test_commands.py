"""The commands from outside: help, wrong use, lazy imports, and what a library user gets."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import run
from serving import tiny_model

import gptchat
from gptchat.__main__ import COMMANDS
from gptchat.console import first_line

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ("decode", "train", "serve")


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    ).stdout


def test_help_lists_every_command_with_a_summary() -> None:
    output = run("--help")
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name:10} {summary}" in output


def test_no_command_at_all_is_help() -> None:
    assert run() == run("--help")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_shows_an_example(name: str) -> None:
    output = run(name, "--help")
    assert output.startswith(f"usage: gptchat {name} ")
    assert f"example:\n  gptchat {name}" in output


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_help_of_a_benchmark_shows_its_own_options_and_an_example(benchmark: str) -> None:
    output = run("bench", benchmark, "--help")
    assert f"example:\n  gptchat bench {benchmark}" in output
    assert ("--batches" in output) == (benchmark == "decode")
    assert ("--clients" in output) == (benchmark == "serve")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_option_is_one_line_and_exit_status_2(name: str) -> None:
    output = run(name, "--no-such-option", status=2)
    assert output.startswith(f"error: gptchat {name}: ")
    assert output.count("\n") == 1 and "--help" in output


def test_an_unknown_command_is_one_line_and_exit_status_2() -> None:
    output = run("tarin", "--config", "x.toml", status=2)
    assert output.startswith("error: tarin: no such command; wanted one of corpora, ")
    assert output.count("\n") == 1


def test_help_and_the_package_start_without_torch() -> None:
    code = """
import sys
import gptchat
from gptchat.__main__ import main
sys.argv = ["gptchat", "--help"]
main()
assert "torch" not in sys.modules
"""
    assert "usage: gptchat COMMAND" in python(code)


def test_the_public_names_are_imported_on_first_use() -> None:
    code = f"""
import sys
import gptchat
assert "torch" not in sys.modules
from gptchat import {", ".join(gptchat.__all__)}
for name in gptchat.__all__:
    assert globals()[name] is getattr(gptchat, name) and callable(globals()[name])
"""
    python(code)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Gpt2'"):
        gptchat.Gpt2  # noqa: B018


def test_the_packages_docstring_is_an_example_that_runs(tmp_path: Path) -> None:
    tiny_model(tmp_path / "out/lm/model", "lm")
    assert gptchat.__doc__ is not None
    lines = [line.removeprefix("    ") for line in gptchat.__doc__.splitlines() if "    " in line]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr.decode()


def test_all_of_the_package_its_handlers_and_configs_goes_into_a_wheel() -> None:
    """setuptools takes what pyproject.toml lists, and says nothing of what it leaves out."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name: name.replace(".", "/") for name in settings["packages"]}
    folders |= settings["package-dir"]
    packaged: set[Path] = set()
    for package, folder in folders.items():
        for pattern in ("*.py", *settings["package-data"].get(package, [])):
            packaged |= set((ROOT / folder).glob(pattern))
    tracked = subprocess.run(
        ["git", "ls-files", "gptchat", "handlers", "configs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    left_out = {ROOT / name for name in tracked.stdout.splitlines()} - packaged
    assert {path.name for path in left_out} <= {"README.md", "RESULTS.md", "constraints.txt"}


def test_the_console_script_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["scripts"]["gptchat"].split(":")
    assert callable(getattr(importlib.import_module(module), name))


UNPRINTED = """
import sys
from gptchat.console import cli

def main():
    print("to nobody", end="", file=sys.{stream})  # stays in the stream's buffer
    sys.exit(130)

cli(main)
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_status_is_the_commands_where_its_output_has_no_reader(stream: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [sys.executable, "-c", UNPRINTED.format(stream=stream)]
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(arguments, stdout=writer, stderr=writer, env=buffered, timeout=60)
    os.close(writer)
    assert done.returncode == 130


FULL = "error: output cannot be written: No space left on device\n"


@pytest.mark.parametrize("buffering", ["", "PYTHONUNBUFFERED=1"])
@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("--help >/dev/full", 1, FULL),
        ("corpora --help >/dev/full", 1, FULL),
        ("tarin >/dev/full 2>/dev/full", 2, ""),
        ("corpora --help >&- <&-", 0, ""),
        ("tarin 2>&-", 2, ""),
        ("corpora --help | true", 141, ""),
        ("--help | true", 141, ""),
    ],
)
def test_output_that_cannot_be_written_is_no_traceback(words, status, message, buffering) -> None:
    words, pipe, _ = words.partition("|")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        ["sh", "-c", f"{buffering} '{sys.executable}' -m gptchat {words}"],
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
        stdout=writer if pipe else None,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (status, message)


def test_a_file_that_no_module_could_open_is_named_in_one_line() -> None:
    code = "from gptchat.console import cli; cli(lambda: open('missing/file', 'w'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    message = "error: missing/file: No such file or directory\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_an_exception_without_words_is_named_by_its_kind() -> None:
    assert first_line(MemoryError()) == "MemoryError"
    assert first_line(ValueError("not this\nnor that")) == "not this"

"""The shape of the code: who imports whom, how long things are, what stands where."""

import ast
import importlib.util
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("config", "corpora", "tokenizer", "dialogue", "shards", "batches", "model", "linear", "pretrained", "optim",
         "checkpoint", "sampling", "engine", "evaluate", "world", "runlog", "train", "chat", "serve", "bench")
TOP_LEVEL = {"gptchat", "handlers", "configs", "tests", "Makefile", "Dockerfile", "README.md", "LICENSE",
             "pyproject.toml"}
MAX_LINES = {"gptchat": 3000, "handlers": 500}
MAX_FUNCTION = 50


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("**/*.py"))


def imported(path: Path) -> set[str]:
    """The modules of gptchat that a file imports, wherever in it; "" for the package's own namespace."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            module = node.module or ""
            full = [f"{module}.{alias.name}" for alias in node.names] if module == "gptchat" else [module]
        elif isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        else:
            continue
        names |= {name.split(".")[1] for name in full if name.startswith("gptchat.")}
    return names


def test_module_imports_only_modules_above_it() -> None:
    modules = {path.stem: path for path in sources("gptchat") if path.stem != "__init__"}
    assert set(modules) <= set(ORDER), f"not in the reading order: {set(modules) - set(ORDER)}"
    wrong = [f"{name} imports {other}" for name, path in modules.items() for other in sorted(imported(path))
             if ORDER.index(other) >= ORDER.index(name)]
    assert not wrong
    assert not any((ROOT / "gptchat").glob("*/*.py")), "the package is flat"


def test_handlers_import_nothing_that_trains() -> None:
    wrong = {path.name: found for path in sources("handlers")
             if (found := imported(path) & {"corpora", "shards", "batches", "optim", "checkpoint", "runlog", "train"})}
    assert not wrong


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank line, comment or docstring, which the docstrings' contract would make dear."""
    text = path.read_text(encoding="utf-8")
    left = {number for number, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node):
            left -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(left)


@pytest.mark.parametrize("folder", MAX_LINES)
def test_line_budget(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The budget is of code; the figure of all lines is printed beside it."""
    code = {path.name: code_lines(path) for path in sources(folder)}
    everything = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources(folder))
    with capsys.disabled():
        print(f"\n{folder}/: {sum(code.values())} lines of code of {MAX_LINES[folder]}, {everything} with blank lines, "
              f"comments and docstrings: {largest_first(code)}")
    assert sum(code.values()) <= MAX_LINES[folder], code


def largest_first(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(sizes.items(), key=lambda item: -item[1]))


def test_no_function_is_over_50_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = {}
    for path in sources("gptchat") + sources("handlers"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths[f"{path.name}:{node.lineno} {node.name}"] = (node.end_lineno or node.lineno) - node.lineno + 1
    median = statistics.median(lengths.values())
    longest = dict(sorted(lengths.items(), key=lambda item: -item[1])[:3])
    with capsys.disabled():
        print(f"\n{len(lengths)} functions, median {median:.0f} lines, longest: {largest_first(longest)}")
    assert max(lengths.values()) <= MAX_FUNCTION


def tracked() -> list[Path]:
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a git checkout")
    return [Path(name) for name in found.stdout.split("\0") if name and (ROOT / name).exists()]


def test_top_level_holds_what_it_should_and_nothing_else() -> None:
    top = {path.parts[0] for path in tracked()}
    assert not {name for name in top - TOP_LEVEL if not name.startswith(".")}
    assert not [path for path in tracked() if path.suffix in (".bin", ".safetensors", ".mar", ".whl", ".pyc", ".log")]


def test_no_tracked_file_is_large_or_binary() -> None:
    for path in tracked():
        content = (ROOT / path).read_bytes()
        assert len(content) < 200_000, path
        content.decode("utf-8")


@pytest.mark.parametrize("tool", [["ruff", "check", "."], ["mypy"]], ids=lambda tool: tool[0])
def test_linters_are_quiet(tool: list[str]) -> None:
    if importlib.util.find_spec(tool[0]) is None:
        pytest.skip(f"{tool[0]} is not installed")
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

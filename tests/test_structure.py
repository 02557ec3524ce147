"""The structure of the code: who imports whom, how long things are, what files there are."""

import ast
import importlib.util
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A level may import itself and the levels before it; packages on one level are independent.
LEVELS = (
    {"gptchat.console", "gptchat.files", "gptchat.runtime", "gptchat.settings", "gptchat.config"},
    {"gptchat.data"},
    {"gptchat.model"},
    {"gptchat.inference", "gptchat.training"},
    {
        "gptchat.train",
        "gptchat.evaluate",
        "gptchat.runs",
        "gptchat.plot",
        "gptchat.chat",
        "gptchat.serve",
        "gptchat.bench",
        "gptchat.new",
        "gptchat.paths",
        "gptchat.clean",
    },
)
LAZY = {"gptchat", "gptchat.__main__"}  # they import other modules by name, on first use
TOP_LEVEL = {
    "gptchat",
    "handlers",
    "configs",
    "tests",
    "Makefile",
    "Dockerfile",
    "README.md",
    "LICENSE",
    "pyproject.toml",
}
MAX_FUNCTION = 50  # lines
MAX_FILE = 400  # lines


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("**/*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_name(path): path for folder in ("gptchat", "handlers") for path in sources(folder)
}


def imported(module: str) -> set[str]:
    """The modules of gptchat and handlers that a module imports itself, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return {name for name in found & MODULES.keys() if name not in LAZY}


def reached(module: str) -> set[str]:
    """The modules that importing this one imports in the end."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        new = imported(waiting.pop()) - found
        found |= new
        waiting += new
    return found


def room(module: str) -> str:
    """The part of a module's name that LEVELS knows."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("module", sorted(MODULES.keys() - LAZY))
def test_imports_go_downwards_only_transitively(module: str) -> None:
    allowed: set[str] = {room(module)}
    if module.startswith("handlers"):
        allowed = {"handlers", *(room(name) for name in MODULES if name.startswith("handlers"))}
        allowed |= set.union(*LEVELS[:3]) | {"gptchat.inference"}
    else:
        (level,) = [number for number, rooms in enumerate(LEVELS) if room(module) in rooms]
        allowed |= set().union(*LEVELS[:level])
        allowed |= LEVELS[0] if level == 0 else set()
    assert not {name for name in reached(module) if room(name) not in allowed}


def test_no_two_modules_import_each_other() -> None:
    circles = {module for module in MODULES if module in reached(module)}
    assert not circles


def longest(lengths: dict[str, int], n: int = 3) -> str:
    names = sorted(lengths, key=lambda name: -lengths[name])[:n]
    return ", ".join(f"{name} {lengths[name]}" for name in names)


def test_no_function_is_over_50_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = {}
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                name = f"{path.name}:{node.lineno} {node.name}"
                lengths[name] = node.end_lineno - node.lineno + 1
    median = statistics.median(lengths.values())
    with capsys.disabled():
        print(f"\n{len(lengths)} functions, median {median:.0f} lines, longest {longest(lengths)}")
    assert max(lengths.values()) <= MAX_FUNCTION, longest(lengths)


def test_no_file_is_over_400_lines() -> None:
    lengths = {}
    for path in MODULES.values():
        lengths[str(path.relative_to(ROOT))] = len(path.read_text(encoding="utf-8").splitlines())
    assert max(lengths.values()) <= MAX_FILE, longest(lengths)


def tracked() -> list[Path]:
    found = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    if found.returncode:
        pytest.skip("not a git checkout")
    return [Path(name) for name in found.stdout.split("\0") if name and (ROOT / name).exists()]


def test_top_level_holds_what_it_should_and_nothing_else() -> None:
    top = {path.parts[0] for path in tracked()}
    assert not {name for name in top - TOP_LEVEL if not name.startswith(".")}
    assert not [
        path
        for path in tracked()
        if path.suffix in (".bin", ".safetensors", ".mar", ".whl", ".pyc", ".log")
    ]


def test_no_tracked_file_is_large_and_only_pictures_are_binary() -> None:
    for path in tracked():
        content = (ROOT / path).read_bytes()
        assert len(content) < 200_000, path
        if path.parts[0] == ".github" and path.suffix == ".png":
            assert content.startswith(b"\x89PNG"), path
        else:
            content.decode("utf-8")


LINTERS = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"])


@pytest.mark.slow  # `make check` runs them itself
@pytest.mark.parametrize("linter", LINTERS, ids=lambda linter: " ".join(linter[:2]))
def test_linters_are_quiet(linter: list[str]) -> None:
    if importlib.util.find_spec(linter[0]) is None:
        pytest.skip(f"{linter[0]} is not installed")
    done = subprocess.run(
        [sys.executable, "-m", *linter], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


WAITS = {"wait", "join", "result", "recv", "communicate"}  # for ever, without an argument
RUNS = {"subprocess.run", "subprocess.check_output", "subprocess.check_call"}


@pytest.mark.parametrize("path", sources("tests"), ids=lambda path: path.name)
def test_whatever_a_test_waits_for_has_a_deadline(path: Path) -> None:
    endless = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.While) and isinstance(node.test, ast.Constant):
            endless.append(f"{path.name}:{node.lineno}: while True")
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        has_timeout = any(keyword.arg in ("timeout", None) for keyword in node.keywords)
        waits = node.func.attr in WAITS and not node.args
        if (waits or ast.unparse(node.func) in RUNS) and not has_timeout:
            endless.append(f"{path.name}:{node.lineno}: {ast.unparse(node.func)}")
    assert not endless

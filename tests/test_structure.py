"""The structure of the code: imports go downwards only, and no data or weights are tracked."""

import ast
import functools
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A module may import its own room and the rooms of the rows above it; rooms of a row are siblings.
# A room that is not named here is a command; it may import all of these.
ROWS = (
    ("console", "files", "artifacts", "runtime", "settings", "config"),
    ("data",),
    ("model",),
    ("inference", "training"),
    ("train", "figures", "chat", "serve", "bench", "new"),
)
LAZY = {"gptchat", "gptchat.__main__"}  # they import other modules by name, on first use
TRACKED = {  # what may stand at the top beside hidden files
    *("gptchat", "handlers", "configs", "tests"),
    *("Makefile", "Dockerfile", "README.md", "LICENSE", "pyproject.toml"),
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_name(path): path
    for folder in ("gptchat", "handlers")
    for path in sorted((ROOT / folder).glob("**/*.py"))
}


def room(module: str) -> str:
    """The part of a module's name that ROWS knows, or `handlers`."""
    first, *rest = module.split(".")
    return first if first == "handlers" else rest[0]


@functools.cache
def imported(module: str) -> set[str]:
    """The modules of gptchat and handlers that a module imports itself, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return (found & MODULES.keys()) - LAZY


def reached(module: str) -> set[str]:
    """The modules that importing this one imports in the end."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        new = imported(waiting.pop()) - found
        found |= new
        waiting += new
    return found


@pytest.mark.parametrize("module", sorted(MODULES.keys() - LAZY))
def test_imports_go_downwards_only(module: str) -> None:
    if room(module) == "handlers":
        allowed = {"handlers", *ROWS[0], *ROWS[1], *ROWS[2], "inference"}
    else:
        rows = [number for number, rooms in enumerate(ROWS) if room(module) in rooms]
        row = rows[0] if rows else len(ROWS)
        allowed = {room(module)}.union(*ROWS[:row], ROWS[0] if row == 0 else ())
    found = reached(module)
    assert {name for name in found if room(name) not in allowed} == set()
    assert module not in found, "a circle of imports"


def test_no_weights_or_data_are_tracked() -> None:
    found = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if found.returncode:
        pytest.skip("not a git checkout")
    paths = [Path(name) for name in found.stdout.split("\0") if name and (ROOT / name).exists()]
    assert {path.parts[0] for path in paths if path.parts[0][0] != "."} <= TRACKED
    for path in paths:
        content = (ROOT / path).read_bytes()
        assert len(content) < 200_000, path
        if path.suffix != ".png":
            content.decode("utf-8")  # raises for a binary file

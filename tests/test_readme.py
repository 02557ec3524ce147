"""What the READMEs name exists: links, `make` targets, commands, modules, files and config keys."""

import dataclasses
import re
from pathlib import Path

import pytest

from gptchat.__main__ import COMMANDS
from gptchat.config import Config

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("gptchat", "handlers", "configs", "tests", ".github")
READMES = [ROOT / "README.md"]
READMES += sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("**/README.md"))
SECTIONS = {field.name: field.default for field in dataclasses.fields(Config)}
KEYS = {
    section: {field.name for field in dataclasses.fields(default)}
    for section, default in SECTIONS.items()
    if dataclasses.is_dataclass(default)
}

readmes = pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))


def code_of(readme: Path) -> list[str]:
    """A page's code without comments: its code blocks' lines, and what stands in backticks."""
    text = readme.read_text(encoding="utf-8")
    lines: list[str] = []
    for block in re.findall(r"```\w*\n(.*?)```", text, re.S):
        lines += block.splitlines()
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += re.findall(r"^(?: {4,}|\t)(.*)", text, re.M)
    lines += re.findall(r"`([^`\n]+)`", text)
    return [line.partition(" #")[0] for line in lines if not line.startswith("error: ")]


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_folder_that_readers_open_has_a_readme() -> None:
    for folder in ("", "gptchat", "gptchat/bench", "handlers", "configs"):
        assert ROOT / folder / "README.md" in READMES


@readmes
def test_every_relative_link_leads_somewhere(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    links += re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (readme.parent / name).resolve() if name else readme
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@readmes
def test_every_make_target_exists(readme: Path) -> None:
    rules = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for code in code_of(readme):
        for words in re.findall(r"(?:^|\s)make((?: [a-z]+\b(?![=/.]))+)", code):
            assert set(words.split()) <= set(rules), code


@readmes
def test_every_command_and_module_exists(readme: Path) -> None:
    for code in code_of(readme):
        for name in re.findall(r"^gptchat ([a-z]+)", code):
            assert name in COMMANDS, code
        for name in re.findall(r"-m gptchat\.([\w.]+)", code):
            path = ROOT / "gptchat" / name.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), code


@readmes
def test_every_config_key_exists(readme: Path) -> None:
    for code in code_of(readme):
        for section, key in re.findall(r"(?:^|\s)([a-z]+)\.(\w+)=", code):
            assert key in KEYS[section], code
        for key in re.findall(r"\s([a-z_]+)=", code):
            if code.startswith("gptchat train"):
                assert key in SECTIONS, code
    for key, section in re.findall(r"^    (\w+) = .*# \[(\w+)\]", readme.read_text(), re.M):
        assert key in KEYS[section]


@readmes
def test_every_config_and_test_file_exists(readme: Path) -> None:
    for code in code_of(readme):
        for name in re.findall(r"\b(?:configs|tests)/[\w./-]+\.(?:toml|py|yaml|properties)", code):
            assert (ROOT / name).exists() or name.startswith("configs/mine/"), code


@pytest.mark.parametrize("folder", ["data", "model", "inference", "training"])
def test_the_map_has_a_line_for_every_module(folder: str) -> None:
    text = (ROOT / "gptchat/README.md").read_text(encoding="utf-8")
    modules = {path.name for path in (ROOT / "gptchat" / folder).glob("*.py")} - {"__init__.py"}
    assert modules == set(re.findall(rf"^\| `{folder}/(\w+\.py)` \|", text, re.M))

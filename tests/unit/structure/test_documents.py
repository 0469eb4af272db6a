"""README.md and docs/: links, lengths, and commands that the parser accepts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from infini_train.cli.parser import build_parser, expand_aliases

ROOT = Path(__file__).parents[3]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
LAUNCHER = re.compile(r"(\S*python )?launch/local\.py \d+ (?P<command>.*)")
OUR_COMMAND = re.compile(r"(\$ )?(\.venv/bin/)?infini-train +(?P<command>.*)")


def commands(text: str) -> list[list[str]]:
    """Return the arguments of every infini-train command in the code blocks of a page."""
    found = []
    for block in re.findall(r"^```\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            match = OUR_COMMAND.match(line) or LAUNCHER.match(line)
            if match and match["command"].split()[0] != "error:":
                found.append(shlex.split(match["command"], comments=True))
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_lines_and_pages_are_short(path):
    """Tables and code may be wider."""
    code = False
    for line in (lines := path.read_text(encoding="utf-8").splitlines()):
        code ^= line.startswith("```")
        assert code or len(line) <= 100 or line.startswith(("|", "    ", "![", "```")) or "](" in line, line
    limit = 180 if path.name == "README.md" else 200
    assert len(lines) <= limit


def test_commands_of_the_documents_are_found():
    assert len([words for path in DOCUMENTS for words in commands(path.read_text(encoding="utf-8"))]) > 30


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_commands_take_the_options_that_the_documents_give_them(path):
    for words in commands(path.read_text(encoding="utf-8")):
        options = build_parser(only=words[0])._subcommands_action.choices[words[0]]._option_string_actions
        for word in expand_aliases(words):
            if word.startswith("--"):
                assert word.partition("=")[0] in options, f"{' '.join(words)}: {word}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_configurations_of_the_documents_exist(path):
    for word in re.findall(r"(?<![\w/])configs/[\w*-]+\.yaml", path.read_text(encoding="utf-8")):
        assert list(ROOT.glob(word)), word

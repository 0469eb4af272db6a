"""README.md and docs/: links, paths, lengths, and commands that the parsers accept."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from benchmarks.run import NAMES
from infini_train.cli.command_list import COMMANDS
from infini_train.cli.configuration import run_config
from infini_train.cli.parser import build_parser, expand_aliases, parse
from infini_train.config import TASK_KINDS

ROOT = Path(__file__).parents[3]
POINTERS = [ROOT / folder / "README.md" for folder in ("kernels", "launch", "slurm")]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *POINTERS, *(ROOT / "docs").rglob("*.md")])
OUR_COMMAND = re.compile(
    r"(\$ )?(\S*/)?(python )?"
    r"(launch/local\.py \d+ +|launch/multinode\.py (?P<launcher>(--\w+ \S+ )*)|infini-train +)(?P<command>.*)"
)
SOURCE_FOLDERS = (ROOT, ROOT / "infini_train", ROOT / "kernels" / "infini_kernels", ROOT / "docs", ROOT / "docs" / "results")
PLACEHOLDERS = {"KIND": TASK_KINDS[0], "FILE": "file", "N": "1", "R": "0"}


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def block_lines(text: str) -> list[str]:
    """Return the lines of the code blocks of a page, with continued lines joined."""
    blocks = re.findall(r"^ *```\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def inline_code(text: str) -> list[str]:
    """Return the inline code of a page."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def commands(lines: list[str]) -> list[list[str]]:
    """Return the arguments of every infini-train command. Commands with a gap (`…`, `...`) are left out."""
    found = []
    for line in lines:
        match = OUR_COMMAND.fullmatch(line)
        if match and not re.search(r"…|\.\.\.|^(preflight .*)?$", match["command"]):
            found.append(shlex.split(match["command"], comments=True))
    return found


@cache
def accept(words: tuple[str, ...]) -> None:
    """Parse a command, and check the values of its configuration."""
    section = parse(list(words))[words[0]]
    if "model" in section:
        run_config(section)


@cache
def options_of(command: str) -> set[str]:
    return set(build_parser(only=command)._subcommands_action.choices[command]._option_string_actions)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text_of(path)):
        if target.startswith("http"):
            continue
        linked = path.parent / target if target else path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text_of(linked), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], anchor


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_lines_and_pages_are_short(path):
    """Tables and code may be wider."""
    code = False
    for line in (lines := text_of(path).splitlines()):
        code ^= line.lstrip().startswith("```")
        assert code or len(line) <= 100 or line.startswith(("|", "    ", "![", "```")) or "](" in line, line
    limit = 180 if path.name == "README.md" else 200
    assert len(lines) <= limit


def test_commands_of_the_documents_are_found():
    texts = [text_of(path) for path in DOCUMENTS]
    assert len([words for text in texts for words in commands(block_lines(text))]) > 30
    assert len([words for text in texts for words in commands(inline_code(text))]) > 20


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_commands_in_code_blocks_are_accepted(path, monkeypatch):
    """The whole command is parsed. Only a configuration that does not exist yet is left out."""
    monkeypatch.chdir(ROOT)
    for words in commands(block_lines(text_of(path))):
        missing = [i for i, word in enumerate(words) if words[i - 1] == "--config" and not Path(word).is_file()]
        kept = [word for i, word in enumerate(words) if i not in missing and i + 1 not in missing]
        accept(tuple(kept))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_inline_commands_have_options_of_their_command(path):
    for words in commands(inline_code(text_of(path))):
        words = [PLACEHOLDERS.get(word, word) for word in words]
        assert words[0] in COMMANDS, words
        for word in expand_aliases(words):
            if word.startswith("--"):
                assert word.partition("=")[0] in options_of(words[0]), f"{' '.join(words)}: {word}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_options_of_the_launchers_exist(path):
    for line in block_lines(text_of(path)):
        if (match := OUR_COMMAND.fullmatch(line)) and match["launcher"]:
            preflight = match["command"].startswith("preflight ")
            options = [("multinode.py", match["launcher"])] + [("preflight.py", match["command"])] * preflight
            for program, words in options:
                for option in re.findall(r"--\w+", words):
                    assert f'"{option}"' in text_of(ROOT / "launch" / program), option


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_make_targets_recipes_and_benchmarks_exist(path):
    lines = block_lines(text_of(path)) + inline_code(text_of(path))
    for line in lines:
        if match := re.match(r"make ([\w-]+)", line):
            assert re.search(rf"^{match[1]}:", text_of(ROOT / "Makefile"), flags=re.MULTILINE), line
        if match := re.search(r"RECIPE=([\w-]+)", line):
            assert list((ROOT / "benchmarks" / "results" / match[1]).glob("seed-*.safetensors")), line
        if match := re.match(r"(?:\S*/)?python -m ((?:benchmarks|tests)\.[\w.]+)(?: (\w+))?", line):
            assert (ROOT / f"{match[1].replace('.', '/')}.py").is_file(), line
            assert match[1] != "benchmarks.run" or match[2] in (*NAMES, "NAME"), line


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_files_that_the_documents_name_exist(path):
    """Paths in inline code, from the root, the package, the kernels, or beside the page."""
    for code in inline_code(text_of(path)):
        if re.fullmatch(r"[\w.*-]+(/[\w.*-]+)+/?", code) and code.endswith((".py", ".yaml", ".env", ".jsonl", ".txt", "/")):
            if code.startswith(("runs/", "checkpoints/", "stacks/", "profile/", "job/")) or re.search(r"[A-Z]{3}", code):
                continue
            assert any(list(folder.glob(code.rstrip("/"))) for folder in (*SOURCE_FOLDERS, path.parent)), code

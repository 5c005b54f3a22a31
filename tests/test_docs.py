"""The documents are short in their lines and paragraphs, and name only modules and settings that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]
)
COLUMNS, PARAGRAPH = 100, 6
LINES = {"docs/architecture.md": 170, "docs/performance.md": 120}

LINK = re.compile(r"\]\([^)]*\)|<?https?://\S+")
NO_TEXT = re.compile(r"#|\||!\[|\s*$")  # a heading, a row of a table, a picture, an empty line
ITEM = re.compile(r"\s*(?:[-*]|\d+\.) ")
CODE = "service|training|bench|tests|deploy|examples"
PATH = re.compile(rf"\b(?:{CODE})/(?:[\w-]+/)*(?:[\w-]+\.[a-z]+)?")  # a folder with its slash, or a file
MODULE = re.compile(rf"(?<![\w./-])(?:{CODE})(?:\.[A-Za-z_]\w*)+")
VARIABLE = re.compile(r"\bVAESERVE_([A-Z_]*[A-Z])\b")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def outside_code(text: str) -> Iterator[tuple[int, str]]:
    """(line number, line) of every line that stands in no fenced block; a fence counts as an empty line."""
    fenced = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            yield number, ""
        elif not fenced:
            yield number, line


def long_lines(text: str) -> list[int]:
    """Numbers of the lines that take more than COLUMNS, without tables, code and the targets of links."""
    return [
        number for number, line in outside_code(text) if not line.startswith("|") and len(LINK.sub("", line)) > COLUMNS
    ]


def long_paragraphs(text: str) -> list[int]:
    """Line numbers at which paragraphs of more than PARAGRAPH lines begin; an item of a list is a paragraph."""
    starts: list[int] = []
    length = 0
    for number, line in outside_code(text):
        length = 0 if NO_TEXT.match(line) else 1 if ITEM.match(line) else length + 1
        if length == PARAGRAPH + 1:
            starts.append(number - PARAGRAPH)
    return starts


def exists(dotted: str) -> bool:
    """Whether a package, a module, or a name that is defined at a module's first level is there."""
    place, parts = ROOT, dotted.split(".")
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    module = place / "__init__.py"
    if parts and (place / f"{parts[0]}.py").is_file():
        module = place / f"{parts.pop(0)}.py"
    source = module.read_text() if module.is_file() else ""
    return not parts or re.search(rf"^(?:(?:async )?def |class )?{parts[0]}\b", source, re.MULTILINE) is not None


def unknown_modules(text: str) -> list[str]:
    """Paths and dotted names of modules in a text that this repository does not hold."""
    paths = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    return paths + [name for name in MODULE.findall(text) if not (ROOT / name).exists() and not exists(name)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_lines_and_paragraphs_are_short(path: Path) -> None:
    text = path.read_text()
    assert not long_lines(text)
    assert not long_paragraphs(text)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_a_document_names_only_modules_that_exist(path: Path) -> None:
    assert not unknown_modules(path.read_text())


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=name_of)
def test_a_document_names_only_settings_that_exist(path: Path) -> None:
    """The changelog may name what was removed."""
    assert {name.lower() for name in VARIABLE.findall(path.read_text())} <= Settings.model_fields.keys()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_link_to_a_file_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("name", LINES)
def test_a_page_that_must_be_read_whole_stays_short(name: str) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= LINES[name]


def test_what_is_excepted_from_the_length_of_lines() -> None:
    excepted = ["| " + "x" * 120 + " |", "[a link](" + "x" * 120 + ")", "```", "x" * 120, "```"]
    assert long_lines("\n".join([*excepted, "x" * COLUMNS, "x" * (COLUMNS + 1)])) == [7]


def test_where_a_paragraph_ends() -> None:
    line, six = "word", ["word"] * PARAGRAPH
    for parts in ([*six, "", *six], ["# a", *six, "| a |", *six], [*six, "- word", *six[1:], "- word"]):
        assert not long_paragraphs("\n".join(parts))
    assert long_paragraphs("\n".join(["", *six, line])) == [2]
    assert long_paragraphs("\n".join(["- word", *six])) == [1]


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("`service/settings.py`, service.settings, `service.settings.Settings`, training.models", []),
        ("service/api/ and tests/test_docs.py", []),
        ("40 examples/s", []),
        ("service/nothing.py", ["service/nothing.py"]),
        ("service/nothing/", ["service/nothing/"]),
        ("`service.nothing`", ["service.nothing"]),
        ("service.settings.Nothing", ["service.settings.Nothing"]),
        ("training.models.Nothing", ["training.models.Nothing"]),
    ],
)
def test_which_modules_are_unknown(text: str, unknown: list[str]) -> None:
    assert unknown_modules(text) == unknown

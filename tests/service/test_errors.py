"""The tree of errors: what its docstring draws is what there is, and nothing in it is dead."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from service import errors

CLASSES = dict(inspect.getmembers(errors, inspect.isclass))
SOURCES = "".join(path.read_text() for path in Path(errors.__file__).parent.rglob("*.py"))


def test_the_docstring_draws_every_error():
    drawn = re.findall(r"^[│ ]*[├└]── (\w+)", errors.__doc__ or "", re.MULTILINE)
    assert {"VaeserveError", *drawn} == set(CLASSES)


def test_every_error_is_raised_somewhere():
    leaves = {name for name, kind in CLASSES.items() if not kind.__subclasses__()}
    raised = set(re.findall(r"(?:(?:raise|return) (?:errors\.)?|else )(\w+)\(", SOURCES))
    assert leaves <= raised

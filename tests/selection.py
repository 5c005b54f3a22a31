"""Which tests are integration tests, outside ``make test-fast``: told by what their code reaches.

A test is one if it, one of its fixtures, or a function of these tests that either of them calls, uses a module that
starts processes or servers, or a function that exports graphs; and so are the benchmark's. Nobody has to mark these:
the mark ``integration`` is for those that train for long, or start something by another way.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, ModuleType
from typing import Any

STARTERS = {"subprocess", "multiprocessing", "socket", "socketserver", "http.server"}
"""Modules by which tests start processes and servers."""
EXPORTERS = {"training.export.graphs", "training.export.staging"}
"""Modules whose functions named export… take seconds."""


def is_integration(file: str, functions: list[Callable[..., Any]]) -> bool:
    """Whether a test of these functions, its own and its fixtures', is an integration test."""
    return file.startswith("test_bench_") or any(_reaches_starter(function) for function in functions)


@cache
def _reaches_starter(function: Callable[..., Any]) -> bool:
    seen, waiting = set(), [function]
    while waiting:
        current = inspect.unwrap(waiting.pop())
        if not inspect.isfunction(current) or not _is_own(current) or current in seen:
            continue
        seen.add(current)
        names = set(_names(current.__code__))
        used = [value for name, value in current.__globals__.items() if name in names]
        if any(_starts(value) for value in used):
            return True
        waiting += [each for value in used for each in _own_functions(value)]
    return False


def _names(code: CodeType) -> Iterator[str]:
    """Every global name and attribute in the code, and in the functions within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _starts(value: object) -> bool:
    """Whether it is one of these modules, something of theirs, or an exporting function."""
    if isinstance(value, ModuleType):
        return value.__name__ in STARTERS
    origin, name = (str(getattr(value, attribute, "")) for attribute in ("__module__", "__name__"))
    return origin in STARTERS or (origin in EXPORTERS and name.startswith("export"))


def _own_functions(value: object) -> list[Any]:
    """The function, or the class's methods."""
    return list(vars(value).values()) if inspect.isclass(value) and _is_own(value) else [value]


def _is_own(value: object) -> bool:
    """Whether the function or class is of these tests, not of a plugin or a library."""
    return str(getattr(value, "__module__", "")).startswith("tests.")

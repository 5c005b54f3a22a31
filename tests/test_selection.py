"""What keeps a test out of ``make test-fast``: whatever its code reaches, by however many steps."""

import subprocess
from subprocess import run

import pytest

from tests.selection import is_integration
from tests.service.http import serving
from tests.training.shared import small_run
from training.export.graphs import roles


def starts_a_process():
    return subprocess.run(["true"], check=True)


def starts_one_by_another_name():
    return run(["true"], check=True)


def starts_one_in_a_helper():
    return starts_a_process()


def starts_one_in_a_function_within():
    return [starts_a_process() for _ in range(2)]


def serves():
    with serving("exported") as client:
        return client


class Helper:
    def help(self):
        return starts_a_process()


def uses_a_class():
    return Helper().help()


def exports():
    small_run("folder")


def calls_itself_and_starts_nothing():
    return calls_itself_and_starts_nothing() or roles(None) or pytest.approx(1)


@pytest.mark.parametrize(
    "function",
    [
        starts_a_process,
        starts_one_by_another_name,
        starts_one_in_a_helper,
        starts_one_in_a_function_within,
        serves,
        uses_a_class,
        exports,
    ],
)
def test_what_reaches_a_process_a_server_or_an_export_is_an_integration_test(function):
    assert is_integration("test_x.py", [calls_itself_and_starts_nothing, function])


def test_what_reaches_none_is_fast():
    assert not is_integration("test_x.py", [calls_itself_and_starts_nothing])
    assert is_integration("test_bench_x.py", [calls_itself_and_starts_nothing])

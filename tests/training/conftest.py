"""Fixtures of the runs that many tests read (tests.training.shared)."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest

from tests.training.shared import Fitted, fit_family, once, root_of, small_run
from training.runs import Run


@pytest.fixture(scope="session")
def shared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of shared runs, one for all processes of the session."""
    return root_of(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def fitted_family(shared_root: Path) -> Callable[[str], Fitted]:
    """Of a name in CASES, its run and its calibrated bundle. Read only."""

    @cache
    def of(case: str) -> Fitted:
        folder = once(shared_root, case.replace(" ", "-").replace(",", ""), partial(fit_family, case=case))
        return Fitted.open(folder / "run")

    return of


@pytest.fixture(scope="session")
def exported_run(shared_root: Path) -> Run:
    """A small VAE's run, exported and not calibrated. Read only: ``copied`` makes a copy."""
    return Run.open(once(shared_root, "small", small_run) / "runs" / "tiny")


@pytest.fixture(scope="session")
def calibrated_run(shared_root: Path) -> Run:
    """The same run, its bundle calibrated. Read only."""
    return Run.open(once(shared_root, "small", small_run) / "calibrated" / "runs" / "tiny")

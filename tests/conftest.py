"""Fixtures that every room shares: a real PPCA bundle on disk and the model loaded from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.bundle.files import open_bundle
from service.inference.model import Model
from service.inference.sessions import Runtime
from tests.ppca_bundle import Ppca, fit_ppca, images, write_ppca_bundle


@pytest.fixture(scope="session")
def ppca_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository: NAME/VERSION folders, with ppca/1 in it. Read only: tests share it."""
    root = tmp_path_factory.mktemp("exported")
    write_ppca_bundle(root)
    return root


@pytest.fixture(scope="session")
def ppca_path(ppca_root: Path) -> Path:
    """The bundle ppca/1."""
    return ppca_root / "ppca" / "1"


@pytest.fixture(scope="session")
def ppca() -> Ppca:
    """The parameters behind ppca/1, with its closed-form log_likelihood."""
    return fit_ppca(images(400), latent_dim=5)


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    """The CPU runtime."""
    return Runtime("cpu")


@pytest.fixture(scope="session")
def model(ppca_path: Path, runtime: Runtime) -> Model:
    """ppca/1, loaded."""
    return Model.load(open_bundle(ppca_path), runtime)

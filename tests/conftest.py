"""What every test shares: a PPCA bundle on disk and the model loaded from it; and which tests are fast."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from service.bundle.files import open_bundle
from service.inference.model import Model
from service.inference.sessions import Runtime
from tests.ppca_bundle import Ppca, fit_ppca, images, write_ppca_bundle
from tests.selection import is_integration

settings.register_profile("untimed", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the integration tests, which ``make test-fast`` leaves out."""
    for item in items:
        if isinstance(item, pytest.Function):
            fixtures = [definition.func for each in item._fixtureinfo.name2fixturedefs.values() for definition in each]
            if is_integration(item.path.name, [item.function, *fixtures]):
                item.add_marker("integration")


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

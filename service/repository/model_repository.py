"""ModelRepository: it finds bundles under a folder, verifies, loads and warms them, and hands them out by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from service.bundle.files import find_bundles
from service.bundle.manifest import Manifest
from service.calibration.conformal import Calibrator
from service.errors import BundleError, BundleFormatError, BundleNotFound, ConfigurationError, ModelNotFound
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.inference.tiled import TiledModel, is_tiled
from service.inference.verification import verify_bundle
from service.logs import get_logger
from service.resources import available_cpus
from service.settings import Settings


@dataclass(frozen=True)
class Served:
    """A loaded, verified and warm model beside its calibration, which is empty if the bundle has none.

    ``tiled`` is the same model for whole images of any size, or None for a model that is not one of tiles.
    ``resolved_scores`` keeps which scores a request's parameters mean, for the next request with the same ones
    (service.repository.resolving).
    """

    model: Model
    calibrator: Calibrator
    tiled: TiledModel | None = None
    resolved_scores: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def manifest(self) -> Manifest:
        """The manifest of the model's bundle."""
        return self.model.manifest

    @cached_property
    def identity(self) -> dict[str, str]:
        """Name, version and digest of the model, with which every answer says who computed it."""
        return {"name": self.manifest.name, "version": self.manifest.version, "digest": self.model.digest}


class ModelRepository:
    """The models of the bundles below one folder, at NAME/VERSION/.

    Names of requests are looked up in a table, never joined to a path. ``skipped``: bundles that failed their
    verification, with the reason, where broken ones are skipped.
    """

    def __init__(self, root: Path, runtime: Runtime, default_model: str = "", skip_broken: bool = False) -> None:
        self.root = root
        self.runtime = runtime
        self.skipped: dict[str, str] = {}
        self._default_model = default_model
        self._skip_broken = skip_broken
        self._served: dict[str, dict[int, Served]] = {}

    @property
    def ready(self) -> bool:
        """True when at least one model is loaded, verified and warm."""
        return bool(self._served)

    def load(self, only: Collection[str] | None = None) -> None:
        """Load every bundle below the root, or only those whose "NAME/VERSION" is in ``only``.

        Raises:
            BundleNotFound: there is no bundle at all.
            BundleError: a bundle fails its verification (unless broken ones are skipped).
            ConfigurationError: the configured default model is not among the bundles.
        """
        paths = [p for p in bundles_of(self.root) if only is None or f"{p.parent.name}/{p.name}" in only]
        with ThreadPoolExecutor(available_cpus(), thread_name_prefix="load") as pool:
            loadings = [(path, pool.submit(load_bundle, path, self.runtime, pool)) for path in paths]
            for number, (path, loading) in enumerate(loadings, 1):
                self._take(path, loading, f"{number} of {len(paths)}")
        if self._default_model and self._default_model not in self._served:
            raise ConfigurationError(f"default_model {self._default_model!r} is not served: {self._names()}")

    def _take(self, path: Path, loading: Future[Served], progress: str) -> None:
        """Serve a bundle that has been loaded, or skip it if it is broken and may be skipped. Raises as ``load``."""
        try:
            served = loading.result()
        except BundleError as error:
            if not self._skip_broken:
                raise
            self.skipped[str(path)] = str(error)
            get_logger().error("bundle skipped", path=str(path), reason=str(error), progress=progress)
            return
        self._served.setdefault(served.manifest.name, {})[int(served.manifest.version)] = served
        get_logger().info("model loaded", **served.identity, progress=progress)

    def get(self, name: str | None = None, version: str | None = None) -> Served:
        """Look up a model by its name (None: the default one) and its version (None: the latest).

        Raises:
            ModelNotFound: no such model or version; another one is never taken instead.
        """
        name = self._default() if name is None else name
        versions = self._served.get(name)
        if versions is None:
            raise ModelNotFound(f"no model {name[:80]!r} is served here: {self._names()}")
        if version is None:
            return versions[max(versions)]
        matching = [served for served in versions.values() if served.manifest.version == version]
        if not matching:
            raise ModelNotFound(f"model {name!r} has no version {version[:20]!r}: {', '.join(map(str, versions))}")
        return matching[0]

    def latest(self) -> list[Served]:
        """List the latest version of every model, ordered by name."""
        return [self.get(name) for name in sorted(self._served)]

    def versions(self, name: str) -> list[str]:
        """List all served versions of a model, oldest first."""
        return [str(version) for version in sorted(self._served.get(name, {}))]

    def __iter__(self) -> Iterator[Served]:
        for versions in self._served.values():
            yield from versions.values()

    @property
    def default_name(self) -> str | None:
        """Name of the model that requests without a model's name address: the configured one, or the only one."""
        if self._default_model:
            return self._default_model
        return next(iter(self._served)) if len(self._served) == 1 else None

    def _default(self) -> str:
        name = self.default_name
        if name is None:
            raise ModelNotFound(
                f"no default model is set and several are served: {self._names()}; "
                "ask for /v1/models/{model}/… or set default_model"
            )
        return name

    def _names(self) -> str:
        return ", ".join(sorted(self._served)) or "none"


def load_repository(settings: Settings, only: Collection[str] | None = None) -> ModelRepository:
    """Make a repository of the settings' folder, with every model loaded, verified and warm.

    ``only``: the "NAME/VERSION" of the bundles to load, all by default.

    Raises:
        BundleError, ConfigurationError, DeviceUnavailable: see ModelRepository.load and Runtime.
    """
    runtime = Runtime(settings.device, settings.threads or None, settings.row_threads)
    repository = ModelRepository(settings.repository, runtime, settings.default_model, settings.skip_broken)
    repository.load(only)
    return repository


def load_one(settings: Settings, name: str | None = None) -> Served:
    """Load the latest version of one model (None: the default one), verified and warm; no other bundle is read.

    Raises:
        BundleNotFound: there is no bundle at all.
        ModelNotFound: no such model, or no default among several.
        BundleError, DeviceUnavailable: see load_bundle and Runtime.
    """
    paths = bundles_of(settings.repository)
    names = sorted({path.parent.name for path in paths})
    if name is None and not settings.default_model and len(names) > 1:
        raise ModelNotFound(f"several models are there: {', '.join(names)}; ask for one of them or set default_model")
    name = name if name is not None else settings.default_model or names[0]
    if name not in names:
        raise ModelNotFound(f"no model {name!r} is there: {', '.join(names)}")
    versions = [path for path in paths if path.parent.name == name]
    latest = max(versions, key=lambda path: int(path.name) if path.name.isdecimal() else -1)
    return load_bundle(latest, Runtime(settings.device, settings.threads or None))


def bundles_of(root: Path) -> list[Path]:
    """List the folders of all bundles below ``root``, sorted. Raises BundleNotFound where there is none."""
    paths = sorted(find_bundles(root))
    if not paths:
        raise BundleNotFound(f"no bundle under {root}: expected NAME/VERSION/manifest.json")
    return paths


def load_bundle(path: Path, runtime: Runtime, pool: Executor | None = None) -> Served:
    """Verify, load and warm up the bundle in that folder; idle threads of ``pool`` help.

    Raises:
        BundleError: verification found something wrong; the text says what.
    """
    report = verify_bundle(path, runtime)
    if report.model is None or report.error is not None:
        raise type(report.error or BundleError())(f"{path} fails verification: {report.summary()}")
    model = report.model
    _check_location(path, model.manifest)
    model.warm_up(pool)
    tiled = TiledModel(model) if is_tiled(model.manifest) else None
    return Served(model, Calibrator.from_bundle(model.bundle), tiled)


def _check_location(path: Path, manifest: Manifest) -> None:
    """Raise BundleFormatError for a bundle that does not lie in NAME/VERSION/ of its manifest."""
    folder = path.resolve()
    if (folder.parent.name, folder.name) != (manifest.name, manifest.version):
        raise BundleFormatError(
            f"{path} holds {manifest.name} {manifest.version}: expected it under {manifest.name}/{manifest.version}/"
        )

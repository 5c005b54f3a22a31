"""The command ``vaeserve models``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from service.commands.console import MAX_COLUMNS, RepositoryOption, exit_on_error
from service.commands.environment import settings_with


def models(repository: RepositoryOption = None) -> None:
    """List the bundles of a folder."""
    from service.bundle.files import open_bundle
    from service.repository.model_repository import bundles_of

    with exit_on_error():
        root = settings_with(repository=repository).repository
        table = Table("model", "version", "family", "shape", "latents", "score", "calibration", "digest")
        for path in bundles_of(root):
            bundle = open_bundle(path)
            manifest = bundle.manifest
            table.add_row(
                manifest.name,
                manifest.version,
                manifest.family,
                "×".join(map(str, manifest.preprocessing.natural)),
                str(manifest.signature.latent_dim),
                manifest.default_score,
                str(manifest.calibration.n) if manifest.calibration else "none",
                bundle.digest[:12],
            )
        Console(width=MAX_COLUMNS).print(table)

"""Publishing: the staged bundle with its card and figures, under the next free version, verified once more."""

from __future__ import annotations

from pathlib import Path

from service.bundle.files import next_version, write_bundle
from service.bundle.manifest import Manifest
from service.inference.verification import open_verified
from training.errors import ExportError
from training.export.provenance import provenance
from training.export.staging import contents, open_staged
from training.reporting import figures
from training.reporting.card import FIGURES, card
from training.reporting.report import draw
from training.runs import Run

CARD = "README.md"


def publish(run: Run, root: Path, version: str | None = None) -> Path:
    """Write root/NAME/VERSION, the next free version by default; its path.

    Raises ExportError unless the run was evaluated, exported and calibrated, VaeserveError when the version exists or
    the bundle does not verify.
    """
    if run.metrics() is None:
        raise ExportError(f"{run.folder} was not evaluated: run `vaetrain evaluate {run.folder}` first")
    staged = open_staged(run, calibrated=True)
    content, files = contents(staged)
    content |= {"version": version or next_version(root, run.name), "provenance": provenance(run)}
    pictures = _figures(run, staged.manifest)
    files |= {f"figures/{key}.png": data for key, data in pictures.items()}
    manifest = staged.manifest.model_validate(content | {"files": staged.manifest.files})
    files[CARD] = card(manifest, {key: f"figures/{key}.png" for key in pictures}).encode()
    return write_bundle(root, content, files, verify=open_verified)


def _figures(run: Run, manifest: Manifest) -> dict[str, bytes]:
    drawn = draw(run, manifest)
    if f"score-{manifest.default_score}" in drawn:
        drawn["score"] = drawn[f"score-{manifest.default_score}"]
    return {key: figures.png(drawn[key]) for key in FIGURES if key in drawn}

"""``vaeserve calibrate``: it bases a bundle's verdicts on a user's own good rows, without training anything again.

The rows are put in a seeded order: a share of them fits the scores' detectors anew, the rest calibrates. Neither sees
the other, so that the false-positive rate is that of rows like these. For a model of tiles the rows are whole images:
tiles of the first share fit detectors and tails, and each image of the rest calibrates by its one aggregated score.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from service.bundle.files import Bundle, next_version, open_bundle, write_bundle
from service.bundle.manifest import CALIBRATION, DETECTORS, TILES, Manifest, ScoreDefinition
from service.calibration.conformal import Calibrator, calibration_key
from service.calibration.contamination import Contamination, contamination, rate_after_trimming, trimmed
from service.commands.calibration_data import CalibrationData, Progress
from service.errors import BundleError, InvalidInput
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.inference.tiled import tile_tail_arrays
from service.inference.verification import open_verified
from service.scores.detectors import Latent
from service.scores.fitting import COMBINED, fitted_arrays, fitted_definitions

SPLIT = "own rows"
QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
SEED = 0


@dataclass(frozen=True)
class RecalibrationPlan:
    """Choices of a recalibration.

    ``fit_share``: share of the rows that fit the scores anew; 0 keeps the bundle's. ``trim``: share of the calibration
    scores to leave out from the top; None: nothing, "auto": what the tail test suspects. ``false_positive_rate``: a
    rate that the calibration must be able to answer.
    """

    fit_share: float = 0.3
    trim: float | str | None = None
    false_positive_rate: float | None = None


@dataclass
class RecalibrationOutcome:
    """Result of a recalibration.

    ``path``: the new bundle's folder. ``n``: scores that calibrate; ``n_fit``: rows that the scores were fitted to;
    ``groups``: scores that calibrate each group. ``suspects``: indices of rows that look like outliers. ``notes``: what
    the operator should know, in words.
    """

    path: Path
    n: int
    n_fit: int
    groups: dict[str, int]
    suspects: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def recalibrate(
    bundle: Bundle,
    rows: CalibrationData,
    groups: Sequence[str | None] | None,
    root: Path,
    plan: RecalibrationPlan,
    progress: Progress | None = None,
) -> RecalibrationOutcome:
    """Write the next version of the bundle below ``root``, calibrated on ``rows``.

    ``groups``: the name of each row's group, or None for a row without one; a calibration of each group is kept beside
    that of all rows. Raises InvalidInput for too few rows, and whatever write_bundle raises.
    """
    order = np.random.RandomState(SEED).permutation(len(rows))
    n_fit = _count_to_fit(rows, bundle, plan)
    fit, held_out = order[:n_fit], np.sort(order[n_fit:])
    _check_rate(len(held_out), plan)
    _check_groups(bundle.manifest, groups, held_out)
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    manifest = bundle.manifest.model_dump(mode="json", exclude={"files"})
    notes = _notes_on_groups(bundle.manifest, groups)
    if n_fit:
        notes += _refit(bundle, rows.sample(bundle.manifest, fit), manifest, files, progress)
    elif plan.fit_share:
        notes.append(f"{len(rows)} {rows.noun} are too few to fit the scores anew: those of the bundle are kept")
    manifest["calibration"] = None
    files.pop(CALIBRATION, None)
    with _loaded(manifest, files, root) as model:
        tails = rows.tails(model, fit, progress) if n_fit else None
        scores = rows.scores(model, tails, held_out, progress)
    if tails is not None:
        files[TILES] = _npz(tile_tail_arrays(tails))
    default = manifest["default_score"]
    suspects = contamination(scores[default])
    kept, removed = _trimmed(scores, suspects, plan)
    notes += _notes(suspects, removed, len(held_out), plan)
    by_group = _by_group(scores, groups, held_out)
    counts = {group: len(by_group[calibration_key(default, group)]) for group in _names(groups)}
    manifest["calibration"] = _summary(kept, counts, n_fit, removed)
    files[CALIBRATION] = _npz({name: np.sort(values) for name, values in kept.items()} | by_group)
    path, indices = _written(root, manifest, files), held_out[suspects.indices].tolist()
    return RecalibrationOutcome(path, len(kept[default]), n_fit, counts, indices, notes)


def _count_to_fit(rows: CalibrationData, bundle: Bundle, plan: RecalibrationPlan) -> int:
    """Number of rows that fit the scores anew. Raises InvalidInput for too few rows to calibrate on."""
    if len(rows) < 2:
        raise InvalidInput(
            f"{rows.noun} to calibrate on: {len(rows)}, expected at least 2, and 99 for a false-positive rate of 1%"
        )
    return rows.count_to_fit(bundle.manifest, round(plan.fit_share * len(rows)))


def _check_rate(n: int, plan: RecalibrationPlan) -> None:
    """Raise InvalidInput, with the number needed, where n calibration scores cannot answer the plan's rate."""
    if plan.false_positive_rate is not None:
        Calibrator({"rows": np.arange(float(n))}).threshold("rows", plan.false_positive_rate)


def _default_score(manifest: Manifest, definitions: Mapping[str, ScoreDefinition]) -> str:
    """Name of the new default score: the bundle's own, or ``combined`` where the bundle could not choose that."""
    return COMBINED if COMBINED in definitions.keys() - manifest.scores.keys() else manifest.default_score


def _check_groups(manifest: Manifest, groups: Sequence[str | None] | None, indices: np.ndarray) -> None:
    """Raise InvalidInput for a name that no group can have, and for a group without rows to calibrate on."""
    for group in _names(groups):
        assert groups is not None
        calibration_key(manifest.default_score, group)
        if not any(groups[i] == group for i in indices):
            raise InvalidInput(f"group {group!r} has no row left to calibrate on: give it more, or fit on fewer")


def _notes_on_groups(manifest: Manifest, groups: Sequence[str | None] | None) -> list[str]:
    """Note, where the bundle has groups and its next version has none, how to make them anew."""
    old = sorted(manifest.calibration.groups) if manifest.calibration else []
    if groups is not None or not old:
        return []
    return [f"this version has no groups, the bundle had {', '.join(old)}: --groups makes them anew, of subfolders"]


def _written(root: Path, manifest: Mapping[str, object], files: Mapping[str, bytes]) -> Path:
    """Write the bundle as the next free version, or the one after where another process takes it meanwhile."""
    name = str(manifest["name"])
    while True:
        version = next_version(root, name)
        try:
            return write_bundle(root, {**manifest, "version": version}, files, verify=open_verified)
        except BundleError:
            if not (root / name / version).exists():
                raise


def _refit(
    bundle: Bundle,
    x: np.ndarray,
    manifest: dict[str, Any],
    files: dict[str, bytes],
    progress: Progress | None,
) -> list[str]:
    """Fit the bundle's scores to x, float32 [m,C,H,W], and write them into ``manifest`` and ``files``; return notes."""
    definitions, arrays = _fitted(bundle, x, progress)
    old, new = bundle.manifest.default_score, _default_score(bundle.manifest, definitions)
    manifest["scores"] = {name: definition.model_dump(mode="json") for name, definition in definitions.items()}
    manifest["default_score"] = new
    files[DETECTORS] = _npz(arrays)
    files.pop(TILES, None)
    return [] if new == old else [f"the default score is {new} now, fitted here for the first time; it was {old}"]


def _fitted(
    bundle: Bundle, x: np.ndarray, progress: Progress | None
) -> tuple[dict[str, ScoreDefinition], dict[str, np.ndarray]]:
    """Fit scores and the map to x, float32 [m,C,H,W]: the definitions, and the arrays of detectors.npz.

    ``latent`` compares codes with those of x, and with the codes that the bundle compared with.
    """
    model = Model.load(bundle, Runtime("cpu"))
    definitions = bundle.manifest.scores | fitted_definitions(bundle.manifest)
    stored_codes = [detector.reference for detector in model.detectors.values() if isinstance(detector, Latent)]
    # The combination is fitted to the second half of x, whose codes must not find themselves as neighbours.
    first = x[: (len(x) + 1) // 2]
    return definitions, fitted_arrays(model, definitions, x, first, stored_codes[0] if stored_codes else None, progress)


@contextmanager
def _loaded(manifest: Mapping[str, object], files: Mapping[str, bytes], root: Path) -> Iterator[Model]:
    """Load the model with its new scores and no calibration, from a temporary folder below ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".calibrate.", dir=root) as scratch:
        yield Model.load(open_bundle(write_bundle(scratch, manifest, files)), Runtime("cpu"))


def _trimmed(
    scores: dict[str, np.ndarray], suspects: Contamination, plan: RecalibrationPlan
) -> tuple[dict[str, np.ndarray], int]:
    """Leave out the top share of each score: the scores by name that are kept, and how many of each are left out."""
    if plan.trim is None:
        return scores, 0
    share = suspects.share if plan.trim == "auto" else float(plan.trim)
    kept = {name: trimmed(values, share) for name, values in scores.items()}
    return kept, len(next(iter(scores.values()))) - len(next(iter(kept.values())))


def _notes(suspects: Contamination, removed: int, n: int, plan: RecalibrationPlan) -> list[str]:
    notes = [suspects.message] if suspects.message else []
    if removed:
        rate = plan.false_positive_rate or 0.05
        bound = rate_after_trimming(rate, n, removed)
        notes.append(
            f"the {removed} highest of {n} scores were left out: at p ≤ {rate:g} up to {bound:.3g} of good rows may "
            "now be flagged"
        )
    return notes


def _names(groups: Sequence[str | None] | None) -> list[str]:
    """Names of the groups, sorted."""
    return sorted({group for group in groups or [] if group is not None})


def _by_group(
    scores: Mapping[str, np.ndarray], groups: Sequence[str | None] | None, indices: np.ndarray
) -> dict[str, np.ndarray]:
    """Sorted scores of each group, by the key of calibration.npz."""
    by_key: dict[str, np.ndarray] = {}
    for group in _names(groups):
        assert groups is not None
        members = np.array([groups[i] == group for i in indices])
        by_key |= {calibration_key(name, group): np.sort(values[members]) for name, values in scores.items()}
    return by_key


def _summary(kept: Mapping[str, np.ndarray], groups: Mapping[str, int], n_fit: int, removed: int) -> dict[str, object]:
    return {
        "split": SPLIT,
        "n": len(next(iter(kept.values()))),
        "fitted_on": SPLIT if n_fit else None,
        "n_fit": n_fit,
        "groups": groups,
        "removed": removed,
        "quantiles": {name: {f"{q:g}": float(np.quantile(s, q)) for q in QUANTILES} for name, s in kept.items()},
    }


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
    return buffer.getvalue()

"""Verification of a bundle: every check that a reader would want before trusting it, each reported in words.

>>> report = verify_bundle("exported/digits/1")  # doctest: +SKIP
>>> print(report)  # doctest: +SKIP
ok    files        6 files, sizes and sha256 as the manifest says, nothing else beside them
...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from service.bundle.files import Bundle, open_bundle
from service.bundle.graph_specs import TensorSpec, graph_spec
from service.bundle.manifest import CALIBRATION, REFERENCE, Graph, Manifest, Tolerance
from service.calibration.conformal import Calibrator
from service.errors import (
    BundleFormatError,
    BundleGraphError,
    BundleIntegrityError,
    BundleNotFound,
    BundleParityError,
    DeviceUnavailable,
    VaeserveError,
)
from service.inference.batch_invariance import Arrays
from service.inference.model import Model
from service.inference.sessions import Runtime

REPLAYED: tuple[Graph, ...] = ("backbone", "encoder", "decoder", "joint", "prior", "corruption")
"""Graphs of which reference.npz must hold every output, where the bundle has them."""
BATCH_SIZES = (1, 2, 5)
"""Rows at once in the replay, beside all of them."""
MAX_TOLERANCE = 0.01
"""Largest tolerance that may be declared, relative to an output's size: beyond it parity would say nothing.

Two float32 implementations differ by some 1e-6 of the size, a draw that is rounded to 8 bits by one level of 255.
"""
MAX_SPREAD = 1e-4
"""Largest spread of log w over the samples of one row, relative to log p(x|z)'s size, where the evidence is exact."""


CHECK_NAMES: Mapping[type[VaeserveError], str] = {
    BundleNotFound: "files",
    BundleIntegrityError: "files",
    BundleFormatError: "format",
    BundleGraphError: "graphs",
    BundleParityError: "parity",
    DeviceUnavailable: "device",
}
"""Name of the check that failed, by its error."""


class Check(NamedTuple):
    """One check: its name, whether it passed, and the outcome in words."""

    name: str
    ok: bool
    outcome: str


@dataclass
class Report:
    """Outcome of verify_bundle for the bundle at ``path``, check by check, up to the first failure.

    ``model`` is the loaded model when every check passed, so that a server need not load it again.
    """

    path: Path
    checks: list[Check] = field(default_factory=list)
    error: VaeserveError | None = None
    model: Model | None = None

    @property
    def ok(self) -> bool:
        """True if every check passed."""
        return self.error is None

    def raise_if_failed(self) -> None:
        """Raise the first failure, one of the BundleErrors or DeviceUnavailable; nothing where every check passed."""
        if self.error is not None:
            raise self.error

    def summary(self) -> str:
        """One line that names the failure, or says how many checks passed."""
        return f"{len(self.checks)} checks passed" if self.error is None else f"{self.checks[-1].name}: {self.error}"

    def __str__(self) -> str:
        return "\n".join(f"{'ok' if check.ok else 'FAIL':5} {check.name:12} {check.outcome}" for check in self.checks)


class Parity(NamedTuple):
    """Largest |Δ| of one output from the trainer's, and by how much the worst element exceeds its tolerance."""

    max_abs_error: float
    excess: float


def verify_bundle(path: Path | str, runtime: Runtime | None = None) -> Report:
    """Check the bundle in that folder: files, graphs, signature, parity, calibration.

    The replay runs on ``runtime``, a new one of the CPU by default. A VaeserveError is reported, never raised.
    """
    report = Report(Path(path))
    try:
        _check(report, runtime)
    except VaeserveError as error:
        name = next((name for kind, name in CHECK_NAMES.items() if isinstance(error, kind)), "bundle")
        report.checks.append(Check(name, False, str(error)))
        report.error = error
    return report


def _check(report: Report, runtime: Runtime | None) -> None:
    """Add each check that passes to the report; the first that does not raises."""

    def passed(name: str, outcome: str) -> None:
        report.checks.append(Check(name, True, outcome))

    bundle = open_bundle(report.path)
    files = len(bundle.manifest.files)
    passed("files", f"{files} files, sizes and sha256 as the manifest says, nothing else beside them")
    model = Model.load(bundle, runtime or Runtime("cpu"))
    nodes = model.nodes
    counted = ", ".join(f"{role} {count}" for role, count in nodes.items())
    passed("operators", f"all of the allowed ones of ai.onnx, no external data (nodes: {counted})")
    passed("signature", f"inputs and outputs of {', '.join(nodes)} are the manifest's")
    errors = check_parity(model)
    worst = max(errors, key=lambda name: errors[name])
    allowed = _allowed(bundle.manifest.reference.tolerances[worst])
    passed("parity", f"max |Δ| {errors[worst]:.3g} ({worst}; allowed {allowed}), every output within its tolerance")
    passed("calibration", check_calibration(bundle))
    report.model = model


def replay(model: Model) -> dict[str, float]:
    """Replay reference.npz: max |Δ| from the trainer's outputs, by ``graph.output``; rows run alone and in batches.

    Raises BundleFormatError when reference.npz does not hold what the contract says.
    """
    return {name: parity.max_abs_error for name, parity in _replay(model).items()}


def check_parity(model: Model) -> dict[str, float]:
    """Replay reference.npz as ``replay`` does, and compare with the declared tolerances.

    Raises BundleParityError when an output leaves its tolerance, BundleFormatError as ``replay``.
    """
    parities = _replay(model)
    failed = {name: parity for name, parity in parities.items() if not parity.excess <= 0}
    if failed:
        tolerances = model.manifest.reference.tolerances
        raise BundleParityError(
            "the graphs do not give what the trainer saw: "
            + "; ".join(
                f"{name} differs by {parity.max_abs_error:.3g}, allowed are {_allowed(tolerances[name])}"
                for name, parity in failed.items()
            )
        )
    return {name: parity.max_abs_error for name, parity in parities.items()}


def _replay(model: Model) -> dict[str, Parity]:
    """The worst parity of each output over all batch sizes, by ``graph.output``. Raises BundleFormatError."""
    reference = model.bundle.arrays(REFERENCE)
    _check_reference(model.manifest, reference)
    result: dict[str, Parity] = {}
    for role, feeds in reference_feeds(model.manifest, reference).items():
        for size in (*BATCH_SIZES, len(next(iter(feeds.values())))):
            for output, value in _in_batches(model, role, feeds, size).items():
                name = f"{role}.{output}"
                parity = _compare(value, reference[name], model.manifest.reference.tolerances[name])
                previous = result.get(name, parity)
                result[name] = Parity(*np.maximum(previous, parity).tolist())
    return result


def _in_batches(model: Model, role: Graph, feeds: Arrays, size: int) -> Arrays:
    """Outputs of one graph for all rows of ``feeds``, given to it ``size`` rows at a time."""
    total = len(next(iter(feeds.values())))
    parts = [
        model.run_graph(role, {name: value[i : i + size] for name, value in feeds.items()})
        for i in range(0, total, size)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def reference_feeds(manifest: Manifest, reference: Arrays) -> dict[Graph, Arrays]:
    """Inputs of each graph, by name: the trainer's outputs feed the next graph, so that each is judged by itself."""
    n, k, latent_dim = reference["encoder.z"].shape
    shape = manifest.signature.shape
    parameters = {name: reference[f"decoder.{name}"] for name in manifest.likelihood.parameters}
    feeds: dict[Graph, Arrays] = {
        "encoder": {tensor.name: reference[tensor.name] for tensor in graph_spec(manifest, "encoder").inputs},
        "decoder": {"z": reference["encoder.z"].reshape(n * k, latent_dim)},
        "joint": {"target": reference["encoder.target"], "z": reference["encoder.z"]}
        | {name: value.reshape(n, k, *shape) for name, value in parameters.items()},
    }
    if "observation" in manifest.graphs and "observation.sample" in reference:
        takes_noise = manifest.likelihood.observation_noise != "none"
        feeds["observation"] = parameters | ({"noise": reference["observation_noise"]} if takes_noise else {})
    if "backbone" in manifest.graphs:
        feeds["backbone"] = {"x": reference["backbone_x"]}
    if "corruption" in manifest.graphs:
        feeds["corruption"] = {"x": reference["x"]}
    if "prior" in manifest.graphs:
        feeds["prior"] = {
            tensor.name: reference[f"prior_{tensor.name}"] for tensor in graph_spec(manifest, "prior").inputs
        }
    return feeds


def _check_reference(manifest: Manifest, reference: Arrays) -> None:
    """Check that reference.npz is what the contract and the manifest say. Raises BundleFormatError."""
    specs = _reference_specs(manifest, reference)
    missing = sorted(set(specs) - set(reference))
    if missing:
        raise BundleFormatError(f"{REFERENCE} lacks {missing}")
    if reference["encoder.z"].ndim != 3:
        raise BundleFormatError(f"{REFERENCE}: encoder.z has shape {reference['encoder.z'].shape}, expected [N,K,L]")
    n, k = reference["encoder.z"].shape[:2]
    sizes = {"N": n, "K": k, "M": n * k}
    for name, tensor in specs.items():
        if name.startswith("prior"):
            sizes["M"] = len(np.atleast_1d(reference["prior_noise"]))
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
        array = reference[name]
        if array.shape != shape or array.dtype != tensor.dtype:
            raise BundleFormatError(
                f"{REFERENCE}: {name} is {array.dtype} {array.shape}, expected {tensor.dtype} {shape}"
            )
        if not np.isfinite(array).all() or array.size == 0:
            raise BundleFormatError(f"{REFERENCE}: {name} is empty or holds numbers that are not finite")
    untold = sorted(name for name in specs if "." in name and name not in manifest.reference.tolerances)
    if untold:
        raise BundleFormatError(f"reference.tolerances lacks {untold}")
    for name in specs:
        if "." in name:
            _check_tolerance(name, manifest.reference.tolerances[name], _size(name, reference))
    _check_claims(manifest, reference)


def _reference_specs(manifest: Manifest, reference: Arrays) -> dict[str, TensorSpec]:
    """Tensors that reference.npz must hold, by name; the prior's are last, since their M is their own."""
    specs = {tensor.name: tensor for tensor in graph_spec(manifest, "encoder").inputs}
    roles = [role for role in REPLAYED if role in manifest.graphs]
    outputs = [(role, tensor) for role in roles for tensor in graph_spec(manifest, role).outputs]
    specs |= {f"{role}.{tensor.name}": tensor for role, tensor in outputs if role not in ("prior", "backbone")}
    if "backbone" in roles:  # of N rows, whether or not it takes them one at a time
        (x,), (features,) = graph_spec(manifest, "backbone")
        named = {"backbone_x": x, "backbone.features": features}
        specs |= {name: tensor._replace(shape=("N", *tensor.shape[1:])) for name, tensor in named.items()}
    if "observation.sample" in reference:
        spec = graph_spec(manifest, "observation")
        noise = {f"observation_{tensor.name}": tensor for tensor in spec.inputs if tensor.name == "noise"}
        specs |= noise | {"observation.sample": spec.outputs[0]}
    if "prior" in roles:
        spec = graph_spec(manifest, "prior")
        specs |= {f"prior_{tensor.name}": tensor for tensor in spec.inputs} | {"prior.z": spec.outputs[0]}
    return specs


def _check_claims(manifest: Manifest, reference: Arrays) -> None:
    """Check what the manifest claims of posterior and evidence against the outputs. Raises BundleFormatError.

    A point posterior must have no spread, and exact evidence the same log w at every sample of a row.
    """
    z, loc = reference["encoder.z"], reference["encoder.loc"]
    if manifest.posterior.moments == "point" and (reference["encoder.scale"].any() or (z != loc[:, None]).any()):
        raise BundleFormatError(f"{REFERENCE}: posterior.moments is 'point', but scale is not 0 or z not loc")
    if manifest.evidence == "exact":
        log_p_x_given_z = reference["joint.log_p_x_given_z"]
        log_w = log_p_x_given_z + reference["joint.log_p_z"] - reference["encoder.log_q_z"]
        spread, most = float(np.ptp(log_w, axis=1).max()), MAX_SPREAD * _size("joint.log_p_x_given_z", reference)
        if spread > most:
            raise BundleFormatError(
                f"{REFERENCE}: evidence is 'exact', but log w spreads over {spread:.3g} nats at one row: "
                f"at most {most:.3g} expected"
            )


def _size(name: str, reference: Arrays) -> float:
    """Size that an output's error is relative to: its largest magnitude, of a sum over places that of its terms."""
    values = np.abs(reference[name])
    if (by_place := reference.get(f"{name}_map")) is not None:
        values = np.abs(by_place).sum(axis=(-3, -2, -1), dtype=np.float64)
    return max(1.0, float(values.max()))


def _check_tolerance(name: str, tolerance: Tolerance, size: float) -> None:
    """Raise BundleFormatError for a tolerance above MAX_TOLERANCE of the output's size."""
    allowed, most = tolerance.atol + tolerance.rtol * size, MAX_TOLERANCE * size
    if not allowed <= most:
        raise BundleFormatError(
            f"reference.tolerances: {name} may differ by {_allowed(tolerance)}, which is {allowed:.3g} where it is "
            f"{size:.3g} large: at most {most:.3g} expected"
        )


def _allowed(tolerance: Tolerance) -> str:
    return f"atol {tolerance.atol:g} + rtol {tolerance.rtol:g}"


def _compare(output: np.ndarray, trainers: np.ndarray, tolerance: Tolerance) -> Parity:
    """Parity of one output with the trainer's. Raises BundleGraphError for another shape."""
    if output.shape != trainers.shape:
        raise BundleGraphError(f"a graph gives shape {output.shape} where the trainer saw {trainers.shape}")
    error = np.abs(output.astype(np.float64) - trainers)
    return Parity(float(error.max()), float((error - tolerance.atol - tolerance.rtol * np.abs(trainers)).max()))


def check_calibration(bundle: Bundle) -> str:
    """Describe calibration.npz in words. Raises BundleFormatError when it disagrees with the manifest."""
    declared = bundle.manifest.calibration
    if declared is None:
        if CALIBRATION in bundle.manifest.files:
            raise BundleFormatError(f"{CALIBRATION} is there, but the manifest's calibration is null")
        return "none: scores come without p-values"
    calibrator = Calibrator.from_bundle(bundle)
    if set(declared.quantiles) != set(calibrator.names):
        raise BundleFormatError(
            f"calibration.quantiles tells of {sorted(declared.quantiles)}, {calibrator.names} are there"
        )
    for name in calibrator.names:
        if calibrator.n(name) != declared.n:
            raise BundleFormatError(f"calibration.n is {declared.n}, {CALIBRATION} has {calibrator.n(name)} of {name}")
        groups = {group: calibrator.n(name, group) for group in calibrator.groups(name)}
        if groups != declared.groups:
            raise BundleFormatError(f"calibration.groups is {declared.groups}, {CALIBRATION} has {groups} of {name}")
        _check_quantiles(name, declared.quantiles[name], calibrator.scores(name))
    return f"{declared.n} scores of split {declared.split!r} for {', '.join(calibrator.names)}, sorted and finite"


def _check_quantiles(name: str, quantiles: dict[str, float], scores: np.ndarray) -> None:
    """Raise BundleFormatError for a quantile q that does not lie between the scores around rank q·n.

    One rank either way is allowed, since quantiles are defined in several ways.
    """
    for key, value in quantiles.items():
        try:
            rank = float(key) * (len(scores) - 1)
        except ValueError:
            raise BundleFormatError(f"calibration.quantiles of {name}: {key!r} is no number of [0, 1]") from None
        if not 0 <= rank <= len(scores) - 1:
            raise BundleFormatError(f"calibration.quantiles of {name}: {key!r} is no number of [0, 1]")
        low, high = scores[max(0, int(rank) - 1)], scores[min(len(scores) - 1, int(rank) + 2)]
        if not low <= value <= high:
            raise BundleFormatError(f"calibration.quantiles of {name}: {key} is {value}, outside [{low}, {high}]")


def open_verified(path: Path, runtime: Runtime | None = None) -> Bundle:
    """Verify the bundle in that folder and return it: for write_bundle's ``verify``.

    Raises the VaeserveError of the first check that fails.
    """
    report = verify_bundle(path, runtime)
    report.raise_if_failed()
    assert report.model is not None
    return report.model.bundle

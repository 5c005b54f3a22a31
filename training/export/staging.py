"""Writing a run's bundle: assembled, loaded by service.inference.model, replayed, and only then put in its place."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.bundle.files import Bundle, open_bundle, write_bundle
from service.bundle.input_rules import ArrayPreprocessing, Backbone
from service.bundle.manifest import CALIBRATION, REFERENCE, ScoreDefinition
from service.errors import VaeserveError
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.inference.verification import open_verified, replay
from training.config import ScoreConfig
from training.errors import ExportError
from training.export.graphs import export_corruption, export_graphs, likelihood, posterior, prior, roles, signature
from training.export.parity import backbone_arrays, corruption_arrays, reference_arrays, rounds, to_npz, tolerances
from training.export.provenance import provenance
from training.models.base import LatentVariableModel
from training.progress import Advance
from training.runs import Run

VERSION = "1"
"""Version of every staged bundle; publishing gives it the next free one."""


BOUNDS = {
    "elbo": "negative ELBO in nats: mean of −log w over k posterior samples",
    "iwae": "negative IWAE-k bound in nats: −log of the mean of w over k posterior samples",
}


def score_definitions(model: LatentVariableModel, config: ScoreConfig) -> dict[str, ScoreDefinition]:
    """The scores that the model's evidence allows; where nothing is sampled, k = 1 and one definition say it all."""
    if model.evidence == "bound":
        return {
            name: ScoreDefinition.model_validate(
                {"estimator": name, "k": config.k, "seed": config.seed, "description": text}
            )
            for name, text in BOUNDS.items()
        }
    if model.evidence == "exact":
        dither = " at the dither that the seed fixes" if model.likelihood.dither else ""
        text = f"negative log p(x) in nats, exact{dither}"
        return {"elbo": ScoreDefinition(estimator="elbo", k=1, seed=config.seed, description=text)}
    unit = model.likelihood.unit_of_error
    text = f"reconstruction error ({unit}), summed over the {_numbers(model)}; not a likelihood"
    return {
        "reconstruction": ScoreDefinition(
            estimator="reconstruction", k=1, seed=config.seed, unit=unit, description=text
        )
    }


def _numbers(model: LatentVariableModel) -> str:
    return "image's pixels" if model.likelihood.values == "pixels" else "row's numbers"


def describe(run: Run) -> str:
    """The bundle's description: the configured one, or what kind of model of what data it is."""
    if run.config.description:
        return run.config.description
    model, preprocessing = run.model, run.dataset.preprocessing
    if isinstance(preprocessing, Backbone):
        kind = "pooled" if preprocessing.kind == "vector" else "a map"
        size = f"a frozen backbone's features, {kind}, {'×'.join(map(str, preprocessing.natural))}"
    elif isinstance(preprocessing, ArrayPreprocessing):
        size = f"{preprocessing.kind}s of {'×'.join(map(str, preprocessing.natural))}"
    else:
        size = f"{'×'.join(map(str, model.shape))} pixels"
    family = model.title
    priors = {"standard_normal": "", "none": ", no prior"}
    prior = priors.get(model.prior.family, f", {model.prior.family.replace('_', ' ')} prior")
    plain = model.posterior_family == "diagonal_gaussian" or model.evidence != "bound" or model.kl_groups == "layer"
    posterior = "" if plain else f", {model.posterior_family.replace('_', ' ')} posterior"
    likelihood_name = model.likelihood.family.replace("_", " ")
    explained = {"none": likelihood_name, "delta": "exact density"}.get(
        "delta" if model.likelihood.family == "delta" else model.likelihood.measure, f"{likelihood_name} likelihood"
    )
    return (
        f"{family[0].upper()}{family[1:]} of {run.dataset.name} ({size}): {model.latent_dim} latent dimensions, "
        f"{explained}{posterior}{prior}"
    )


def graphs_to_export(run: Run) -> int:
    """How many graphs ``export`` traces."""
    return len(roles(run.model))


def export(run: Run, progress: Advance = lambda done: None) -> Path:
    """Write runs/NAME/bundle/NAME/1, uncalibrated, in place of one that is there; ``progress`` is told of each graph.

    Raises ExportError, VaeserveError.
    """
    graphs = export_graphs(run.model, progress)
    reference = reference_arrays(run.model, run.dataset, run.config.seed)
    if run.backbone is not None:
        graphs["backbone"] = run.backbone.graph
        reference |= backbone_arrays(run.images, run.dataset, run.backbone.backbone)
    if run.corruption is not None:
        graphs["corruption"] = export_corruption(run.corruption, run.model)
        reference |= corruption_arrays(run.corruption, reference["x"])
    files = {f"{role}.onnx": graph for role, graph in graphs.items()} | {REFERENCE: to_npz(reference)}
    allowed = tolerances(reference, rounds(run.model.likelihood))
    scores = score_definitions(run.model, run.config.score)
    manifest: dict[str, Any] = {
        "name": run.name,
        "version": VERSION,
        "family": run.model.family,
        "description": describe(run),
        "preprocessing": run.input_rule.model_dump(mode="json"),
        "backbone": run.backbone and run.backbone.backbone.model_dump(mode="json"),
        "evidence": run.model.evidence,
        "signature": signature(run.model).model_dump(mode="json"),
        "likelihood": likelihood(run.model).model_dump(mode="json"),
        "prior": prior(run.model).model_dump(mode="json"),
        "posterior": posterior(run.model).model_dump(mode="json"),
        "graphs": {role: f"{role}.onnx" for role in graphs},
        "scores": {name: definition.model_dump(mode="json") for name, definition in scores.items()},
        "default_score": run.config.score.estimator if run.config.score.estimator in scores else next(iter(scores)),
        "reference": {"tolerances": {name: t.model_dump() for name, t in allowed.items()}, "max_abs_error": {}},
        "provenance": provenance(run),
    }
    manifest["reference"]["max_abs_error"] = _measure(manifest, files)
    return replace_bundle(run.folder / "bundle", manifest, files)


def _measure(manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, float]:
    """Largest |Δ| of every output from the trainer's, through service.inference.model, from a bundle written for that
    only."""
    with tempfile.TemporaryDirectory() as root:
        model = Model.load(open_bundle(write_bundle(root, manifest, files)), Runtime("cpu"))
        return replay(model)


def replace_bundle(root: Path, manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> Path:
    """Write and verify a bundle under ``root``; one of the same name and version gives way once the new one stands.

    Raises VaeserveError, and the old bundle stays.
    """
    with tempfile.TemporaryDirectory(prefix=".new.", dir=_made(root)) as scratch:
        new = write_bundle(scratch, manifest, files, verify=open_verified)
        target = root / new.relative_to(scratch)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        new.rename(target)
    return target


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_staged(run: Run, calibrated: bool = False) -> Bundle:
    """The run's staged bundle. Raises ExportError if there is none, or none of the run's weights or calibrated."""
    command = f"`vaetrain export {run.folder}`"
    try:
        bundle = open_bundle(run.staged)
    except VaeserveError as error:
        raise ExportError(f"{run.folder} holds no bundle ({error}): run {command} first") from error
    known = bundle.manifest.provenance.training
    if known.get("weights_sha256") != run.weights_digest or known.get("corruption") != run.corruption_facts:
        raise ExportError(f"the bundle in {run.staged} is of other weights: run {command} again")
    if calibrated and CALIBRATION not in bundle.manifest.files:
        raise ExportError(f"the bundle in {run.staged} is not calibrated: run `vaetrain calibrate {run.folder}` first")
    return bundle


def contents(bundle: Bundle) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A bundle's manifest without ``files``, and its files: what write_bundle takes."""
    manifest = bundle.manifest.model_dump(mode="json", exclude={"files"})
    return manifest, {name: bundle.read(name) for name in bundle.manifest.files}

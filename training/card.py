"""The model card: README.md of a bundle, written from the manifest alone so that the two cannot disagree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from service.bundle import Manifest

FIGURES = {
    "reconstructions": "Test images and their reconstructions",
    "samples": "E[x|z] at draws of the prior",
    "score": "Scores of held-out inliers, with thresholds",
}
METRICS = {
    "log_likelihood": "log p(x), IWAE-{k} bound (nats)",
    "log_likelihood_standard_error": "its standard error over the images (nats)",
    "elbo": "ELBO (nats)",
    "rate": "rate, KL(q(z|x) ‖ p(z)) (nats)",
    "distortion": "distortion, −E log p(x|z) (nats)",
    "bits_per_dim": "bits per dimension of the IWAE bound",
    "active_units": "active latent dimensions of {latent_dim}",
}
BINARISATION = {
    "none": "",
    "dynamic": "Pixels are taken for probabilities: each image is binarised by a draw, x = 1[u < pixel], with u "
    "fixed by the seed of the score.",
    "threshold": "Pixels are binarised at ½: shades within either half of the grey scale are not told apart.",
}
MEASURES = {
    "counting": "log p(x) is the logarithm of a probability.",
    "lebesgue": "log p(x) is the logarithm of a density over pixels in [0, 1] and may be positive; bits per dimension "
    "are stated for 8-bit pixels (8 bits higher).",
}


def card(manifest: Manifest, figures: Mapping[str, str]) -> str:
    """README.md in Markdown; ``figures`` maps keys of FIGURES to file names beside it."""
    sections = [
        f"# {manifest.name}, version {manifest.version}",
        f"{manifest.description}.",
        _what(manifest),
        _data(manifest.provenance.data),
        _metrics(manifest),
        _calibration(manifest),
        _parity(manifest),
        _training(manifest),
        _limitations(manifest),
        "\n\n".join(f"![{FIGURES[key]}]({name})\n\n{FIGURES[key]}." for key, name in figures.items()),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _what(manifest: Manifest) -> str:
    signature, likelihood = manifest.signature, manifest.likelihood
    size = "×".join(map(str, signature.shape))
    rule = manifest.preprocessing
    lines = [
        "## What it is",
        f"A latent variable model of images, {size} (channels × height × width): prior p(z) = N(0, I) over "
        f"{signature.latent_dim} dimensions, likelihood p(x|z) {likelihood.family.replace('_', ' ')}, posterior "
        f"q(z|x) by an encoder (family: {manifest.family}). {MEASURES[likelihood.measure]} "
        f"{BINARISATION[likelihood.binarisation]}",
        f"An image of another size or mode is brought to {rule.mode}, {rule.height}×{rule.width} pixels, by the rule "
        f"`{rule.fit}` with {rule.resample} resampling. `vaeserve serve` serves it, `vaeserve check` verifies it.",
    ]
    return "\n\n".join(line.strip() for line in lines)


def _data(data: Mapping[str, Any]) -> str:
    splits = ", ".join(f"{name} {count:,}" for name, count in data.get("splits", {}).items())
    return (
        "## Data\n\n"
        f"`{data.get('name')}`: {data.get('images', 0):,} images. Disjoint seeded splits: {splits}. "
        f"Fingerprint over pixels, labels and splits (SHA-256): `{data.get('fingerprint')}`."
    )


def _metrics(manifest: Manifest) -> str:
    training = manifest.provenance.training
    parts = ["## Metrics"]
    for split, values in manifest.provenance.metrics.items():
        names = {"k": f"{values['k']:,.0f}", "latent_dim": str(manifest.signature.latent_dim)}
        rows = [[text.format(**names), f"{values[key]:.4g}" if key == "active_units" else f"{values[key]:.3f}"]
                for key, text in METRICS.items() if key in values]  # fmt: skip
        images = f"{values['images']:,.0f}"
        parts.append(
            f"Means over {images} images of the {split} split, by `{training.get('evaluate_command')}`. The "
            "log-likelihood is the log-mean-exp of sampled weights, log p(x|z) + log p(z) − log q(z|x) (Burda et al. "
            "2016)."
        )
        parts.append(_table(["metric", "value"], rows))
    return "\n\n".join(parts)


def _calibration(manifest: Manifest) -> str:
    calibration = manifest.calibration
    if calibration is None:
        return ""
    rows = []
    for name, rates in calibration.realised_false_positive_rate.items():
        for asked, found in rates.items():
            error = math.sqrt(float(asked) * (1 - float(asked)) * (1 / calibration.n_test + 1 / calibration.n))
            rows.append([name, f"{float(asked):.1%}", f"{found:.2%}", f"± {error:.2%}"])
    definitions = "; ".join(
        f"`{name}`: {d.description} (k = {d.k}, seed {d.seed})" for name, d in manifest.scores.items()
    )
    return "\n\n".join([
        "## Scores and calibration",
        f"Higher is more anomalous. {definitions}. The default is `{manifest.default_score}`.",
        f"Conformal p-values from {calibration.n:,} held-out images of the {calibration.split} split. Realised on the "
        f"{calibration.n_test:,} images of the test split, by `vaetrain calibrate runs/{manifest.name}`; beside it one "
        "standard deviation of chance, from the finite size of both splits:",
        _table(["score", "asked false-positive rate", "realised", "chance"], rows),
    ])  # fmt: skip


def _parity(manifest: Manifest) -> str:
    rows = []
    for name, error in manifest.reference.max_abs_error.items():
        tolerance = manifest.reference.tolerances[name]
        rows.append([f"`{name}`", f"{error:.2e}", f"{tolerance.atol:.1e} + {tolerance.rtol:.0e}·abs(value)"])
    return "\n\n".join([
        "## Parity",
        "Largest difference between torch (what trained) and these graphs in ONNX Runtime on a CPU, rows alone and in "
        f"batches; `vaeserve check exported/{manifest.name}/{manifest.version}` replays it.",
        _table(["output", "max abs difference", "allowed"], rows),
    ])  # fmt: skip


def _training(manifest: Manifest) -> str:
    provenance, training = manifest.provenance, manifest.provenance.training
    machine = training.get("machine", {})
    gpu = f", {', '.join(machine['gpu'])}" if machine.get("gpu") else ""
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions.items())
    return "\n\n".join([
        "## How it was trained, and how to repeat it",
        f"{training.get('epochs')} epochs, {training.get('steps'):,} steps ({training.get('skipped_updates')} updates "
        f"skipped) in {duration(training.get('seconds', 0))} on {machine.get('cpu')}, {machine.get('cores')} "
        f"cores{gpu}; finished {provenance.created}, seed {provenance.seed}. The weights are an exponential moving "
        f"average, of the epoch with the best validation bound ({training.get('best_epoch')}). "
        f"Commit `{provenance.commit}`; {versions}.",
        f"```sh\n{training.get('fit_command')}\n{training.get('evaluate_command')}\n```",
    ])  # fmt: skip


def _limitations(manifest: Manifest) -> str:
    calibrated = (
        "- A p-value is valid for images like the calibration images, on average over them; drift, another camera or "
        "another resize voids it until the model is calibrated again.\n"
        if manifest.calibration
        else ""
    )
    return (
        "## Limitations\n\n"
        "- It knows one data set. Likelihood is not novelty: images that are simpler than the training images can "
        "score as less anomalous than these (Nalisnick et al. 2019).\n"
        f"{calibrated}"
        "- Scores are Monte-Carlo bounds at fixed noise: repeatable to the bit, and still estimates; `standard_error` "
        "comes with each."
    )


def duration(seconds: float) -> str:
    """Seconds as a reader would say them.

    >>> duration(3725), duration(42.4)
    ('1 h 2 min', '42 s')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)

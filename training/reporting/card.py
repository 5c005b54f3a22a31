"""The model card: README.md of a bundle, written from the manifest alone so that the two cannot disagree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from service.bundle.input_rules import ArrayPreprocessing, Preprocessing, Tiling
from service.bundle.manifest import Manifest, ScoreDefinition

FIGURES = {
    "reconstructions": "Test {rows} and their reconstructions",
    "samples": "E[x|z] at draws of the prior",
    "score": "Scores of held-out inliers, with thresholds",
}
METRICS = {
    "log_likelihood": "log p(x), {estimate} (nats)",
    "log_likelihood_standard_error": "its standard error over the {rows} (nats)",
    "elbo": "ELBO (nats)",
    "rate": "rate, KL(q(z|x) ‖ p(z)) (nats)",
    "distortion": "distortion, −E log p(x|z) (nats)",
    "reconstruction_error": "reconstruction error ({unit})",
    "reconstruction_error_standard_error": "its standard error over the {rows} ({unit})",
    "bits_per_dim": "bits per dimension of log p(x)",
    "bound_gap": "log p(x) above the ELBO (nats)",
    "effective_sample_size": "effective samples among the k weights",
    "approximation_gap": "gap of the best diagonal Gaussian posterior, first images only (nats)",
    "amortisation_gap": "gap of the encoder to it, first images only (nats)",
    "active_units": "active latent dimensions of {latent_dim}",
}
BINARISATION = {
    "none": "",
    "dynamic": "Pixels are taken for probabilities: each image is binarised by a draw, x = 1[u < pixel], with u "
    "fixed by the seed of the score.",
    "threshold": "Pixels are binarised at ½: shades within either half of the grey scale are not told apart.",
}
DENSITY_OF_PIXELS = (
    "log p(x) is the logarithm of a density over pixels in [0, 1] and may be positive; bits per dimension are stated "
    "for 8-bit pixels (8 bits higher)."
)
DENSITY_OF_NUMBERS = (
    "log p(x) is the logarithm of a density over the numbers in their own units: it may be positive, other units shift "
    "it, and there are no bits per dimension."
)
EVIDENCE = {
    "bound": "log p(x) is bounded from below.",
    "exact": "log p(x) is exact: every bound equals it.",
    "none": "It has no likelihood, and tells what is unusual by its reconstruction error alone.",
}
ESTIMATORS = {
    "bound": "The log-likelihood is the log-mean-exp of sampled weights, log p(x|z) + log p(z) − log q(z|x) (Burda et "
    "al. 2016).",
    "exact": "The log-likelihood is log p(x) itself.",
    "none": "",
}
AT_ONE_DITHER = (
    " It is that of each image at one dequantisation: its bits per dimension bound those of the 8-bit image from above "
    "(Theis et al. 2016)."
)
NAMED_FEATURES = 50


def card(manifest: Manifest, figures: Mapping[str, str]) -> str:
    """README.md in Markdown; ``figures`` maps keys of FIGURES to file names beside it."""
    sections = [
        f"# {manifest.name}, version {manifest.version}",
        f"{manifest.description}.",
        _what(manifest),
        _data(manifest),
        _metrics(manifest),
        _calibration(manifest),
        _parity(manifest),
        _training(manifest),
        _limitations(manifest),
        _figures(manifest, figures),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _what(manifest: Manifest) -> str:
    parts = ", ".join((_prior(manifest), _likelihood(manifest), _posterior(manifest)))
    sentences = (EVIDENCE[manifest.evidence], _measure(manifest), BINARISATION[manifest.likelihood.binarisation])
    return "\n\n".join(filter(None, [
        "## What it is",
        f"A latent variable model of {_shape(manifest)}: {parts} (family: {manifest.family}). "
        f"{' '.join(filter(None, sentences))}",
        _backbone(manifest),
        _corruption(manifest),
        f"{_rule(manifest)} `vaeserve serve` serves it, `vaeserve check` verifies it.",
    ]))  # fmt: skip


def _backbone(manifest: Manifest) -> str:
    """What stands before the model, if anything does."""
    found = manifest.backbone
    if found is None:
        return ""
    kind = "pooled features" if found.kind == "vector" else "a map of features"
    size = "×".join(map(str, found.natural))
    normalised = f" Pixels in [0, 1] are normalised inside: mean {found.mean}, std {found.std}." if found.std else ""
    return (
        f"It does not see the image itself: a frozen network, `{manifest.graphs['backbone']}`, makes {kind} of it "
        f"({size}; tensor `{found.output}` of the file with SHA-256 `{found.sha256}`), and the model is of these. It "
        f"encodes and scores; there is no way back from features to images, so that it does not decode.{normalised}"
    )


def _corruption(manifest: Manifest) -> str:
    """The network beside the model, if there is one."""
    facts = manifest.provenance.training.get("corruption")
    if "corruption" not in manifest.graphs or facts is None:
        return ""
    return (
        f"Beside it stands a small network, `{manifest.graphs['corruption']}`, which tells at each pixel whether noise "
        "was painted over it: the score `corruption`. It was trained on the training images and on noise over parts of "
        f"them, {facts['epochs']} epochs in {duration(facts['seconds'])}; cross-entropy {facts['cross_entropy']:.4f} "
        "nats a pixel on validation images."
    )


def _rows(manifest: Manifest) -> str:
    """What the rows are called: images, vectors or signals."""
    return f"{manifest.preprocessing.kind}s"


def _shape(manifest: Manifest) -> str:
    rule, size = manifest.preprocessing, "×".join(map(str, manifest.preprocessing.natural))
    if rule.kind == "vector":
        return f"vectors of {size} numbers"
    return (
        f"signals, {size} (channels × steps)"
        if rule.kind == "signal"
        else f"images, {size} (channels × height × width)"
    )


def _prior(manifest: Manifest) -> str:
    families = {"standard_normal": "prior p(z) = N(0, I)", "none": "no prior"}
    family = manifest.prior.family
    if manifest.evidence == "none" and family != "none":
        families[family] = f"a density of the codes, {_words(family)}, fitted after the training to sample from,"
    return f"{families.get(family, f'prior p(z) {_words(family)}')} over {manifest.signature.latent_dim} dimensions"


def _likelihood(manifest: Manifest) -> str:
    family = _words(manifest.likelihood.family)
    return f"{family} in place of a likelihood" if manifest.evidence == "none" else f"likelihood p(x|z) {family}"


def _posterior(manifest: Manifest) -> str:
    posterior = manifest.posterior
    if posterior.moments == "point":
        return "z a function of x"
    return f"posterior q(z|x) {_words(posterior.family)} by an encoder"


def _words(family: str) -> str:
    return family.replace("_", " ")


def _measure(manifest: Manifest) -> str:
    if manifest.likelihood.measure == "counting":
        return "log p(x) is the logarithm of a probability."
    if manifest.likelihood.measure == "none":
        return ""
    return DENSITY_OF_PIXELS if manifest.modelled.kind == "image" else DENSITY_OF_NUMBERS


def _rule(manifest: Manifest) -> str:
    """How a row from outside becomes the graphs' input."""
    rule = manifest.preprocessing
    if not isinstance(rule, ArrayPreprocessing):
        if rule.tiling is not None:
            return _tiles(rule, rule.tiling)
        return (
            f"An image of another size or mode is brought to {rule.mode}, {rule.height}×{rule.width} pixels, by the "
            f"rule `{rule.fit}` with {rule.resample} resampling."
        )
    taken = "Numbers are taken as they are, finite and in the units of the training data; what scales them is inside."
    if rule.features is None:
        return taken
    names = ", ".join("`{}`".format(name.replace("`", "'")) for name in rule.features[:NAMED_FEATURES])
    more = len(rule.features) - NAMED_FEATURES
    return f"{taken} Features, in this order: {names}{f' and {more} more, in the manifest' if more > 0 else ''}."


def _tiles(rule: Preprocessing, tiling: Tiling) -> str:
    """How an image of any size is scored by its tiles."""
    aggregates = {
        "maximum": "−log(−m log(1 − p)) nats, p its most anomalous tile's tail probability and m its area in tiles",
        "top": f"the mean of the highest {tiling.share:.0%} of its tiles' scores",
    }
    return (
        f"An image is brought to {rule.mode} and stays as large as it is, at least {rule.height}×{rule.width} pixels. "
        f"It is scored by tiles of that size, {tiling.stride[0]} pixels apart down and {tiling.stride[1]} across; its "
        f"score is {aggregates[tiling.aggregate]}. The scores below were calibrated by whole images; figures of the "
        "bound are of crops."
    )


def _data(manifest: Manifest) -> str:
    data, rows = manifest.provenance.data, _rows(manifest)
    hashed = "pixels" if rows == "images" else "numbers"
    splits = ", ".join(f"{name} {count:,}" for name, count in data.get("splits", {}).items())
    crops = ""
    if "whole_images" in data:
        of = ", ".join(f"{name} {count:,}" for name, count in data.get("whole_splits", {}).items())
        crops = f" They are crops of {data['whole_images']:,} images, which were split whole: {of}."
    return (
        "## Data\n\n"
        f"`{data.get('name')}`: {data.get(rows, 0):,} {rows}.{crops} Disjoint seeded splits: {splits}. "
        f"Fingerprint over {hashed}, labels and splits (SHA-256): `{data.get('fingerprint')}`."
    )


def _metrics(manifest: Manifest) -> str:
    training = manifest.provenance.training
    parts = ["## Metrics"]
    for split, values in manifest.provenance.metrics.items():
        names = _names(manifest, values)
        rows = [[text.format(**names), f"{values[key]:.4g}" if key == "active_units" else f"{values[key]:.3f}"]
                for key, text in METRICS.items() if key in values]  # fmt: skip
        parts.append(
            f"Means over {values['images']:,.0f} {names['rows']} of the {split} split, by "
            f"`{training.get('evaluate_command')}`. {_estimator(manifest)}".strip()
        )
        parts.append(_table(["metric", "value"], rows))
    return "\n\n".join(parts)


def _estimator(manifest: Manifest) -> str:
    dithered = manifest.evidence == "exact" and manifest.modelled.kind == "image"
    return ESTIMATORS[manifest.evidence] + (AT_ONE_DITHER if dithered else "")


def _names(manifest: Manifest, values: Mapping[str, float]) -> dict[str, str]:
    """What METRICS' texts speak of."""
    return {
        "rows": _rows(manifest),
        "unit": manifest.scores[manifest.default_score].unit,
        "estimate": "exact" if manifest.evidence == "exact" else f"IWAE-{values['k']:,.0f} bound",
        "latent_dim": str(manifest.signature.latent_dim),
    }


def _calibration(manifest: Manifest) -> str:
    calibration = manifest.calibration
    if calibration is None:
        return ""
    noun, rates = _rows(manifest), calibration.realised_false_positive_rate
    names = sorted(rates, key=lambda name: name != manifest.default_score)  # the default first
    asked = list(rates[names[0]]) if names else []
    rows = [
        [f"**{name}**" if name == manifest.default_score else name, _defined(manifest.scores[name])]
        + [f"{rates[name][rate]:.2%}" for rate in asked]
        for name in names
    ]
    chance = [f"± {_chance(float(rate), calibration.n, calibration.n_test):.2%}" for rate in asked]
    return "\n\n".join([
        "## Scores and calibration",
        f"Higher is more anomalous; the default is `{manifest.default_score}`. Conformal p-values from "
        f"{calibration.n:,} held-out {noun} of the {calibration.split} split. Columns: the false-positive rate asked "
        f"for; below it what it was on the {calibration.n_test:,} {noun} of the test split, by `vaetrain "
        f"calibrate runs/{manifest.name}`; last, one standard deviation of chance from the finite size of both splits.",
        _table(["score", "what it is", *(f"{float(rate):.1%}" for rate in asked)], [*rows, ["chance", "", *chance]]),
    ])  # fmt: skip


def _defined(definition: ScoreDefinition) -> str:
    drawn = "" if definition.of else f"; k = {definition.k}, seed {definition.seed}"
    return f"{definition.description}{drawn}{': ' if definition.of else ''}{', '.join(definition.of)}"


def _chance(rate: float, n: int, n_test: int) -> float:
    return math.sqrt(rate * (1 - rate) * (1 / n_test + 1 / n))


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
        f"{_loop(training)} in {duration(training.get('seconds', 0))} on {machine.get('cpu')}, {machine.get('cores')} "
        f"cores{gpu}; finished {provenance.created}, seed {provenance.seed}. {_kept(training)}"
        f"Commit `{provenance.commit}`; {versions}.",
        f"```sh\n{training.get('fit_command')}\n{training.get('evaluate_command')}\n```",
    ])  # fmt: skip


def _loop(training: Mapping[str, Any]) -> str:
    if not training.get("steps"):
        return "Solved in one go"
    skipped = training.get("skipped_updates")
    return f"{training.get('epochs')} epochs, {training['steps']:,} steps ({skipped} updates skipped)"


def _kept(training: Mapping[str, Any]) -> str:
    if not training.get("steps"):
        return ""
    return (
        "The weights are an exponential moving average, of the epoch with the best validation bound "
        f"({training.get('best_epoch')}). "
    )


def _limitations(manifest: Manifest) -> str:
    rows = _rows(manifest)
    changes = "another camera or another resize" if rows == "images" else "another instrument or other units"
    points = [
        f"It knows one data set. Likelihood is not novelty: {rows} that are simpler than the training {rows} can score "
        "as less anomalous than these (Nalisnick et al. 2019)."
        if manifest.evidence != "none"
        else f"It knows one data set. A reconstruction error is no likelihood: {rows} that are easily told can score "
        "as less anomalous than the training data, whatever they show.",
        f"A p-value is valid for {rows} like the calibration {rows}, on average over them; drift, {changes} voids it "
        "until the model is calibrated again."
        if manifest.calibration
        else "",
        "Scores are Monte-Carlo bounds at fixed noise: repeatable to the bit, and still estimates; `standard_error` "
        "comes with each."
        if manifest.evidence == "bound"
        else "",
    ]
    return "## Limitations\n\n" + "\n".join(f"- {point}" for point in points if point)


def _figures(manifest: Manifest, figures: Mapping[str, str]) -> str:
    captions = {key: FIGURES[key].format(rows=_rows(manifest)) for key in figures}
    return "\n\n".join(f"![{captions[key]}]({name})\n\n{captions[key]}." for key, name in figures.items())


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

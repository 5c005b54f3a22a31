"""The report of a run: figures as PNG and one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from service.bundle.manifest import Manifest
from service.calibration.conformal import Calibrator
from service.errors import InvalidInput
from service.inference import noise
from training.data.batches import pixel_batches, to_unit
from training.distributions import Normal
from training.evaluation.aggregate import moments, prior_moments
from training.export.staging import open_staged
from training.models.base import LatentVariableModel
from training.progress import Track, untracked
from training.reporting import curves, figures
from training.runs import SCORES, Run, write_text

SHOWN = 10  # rows whose reconstructions are shown
PRIOR_SAMPLES, PRIOR_CURVES = 60, 20
TRAVERSED, STEPS = 8, np.linspace(-3, 3, 9)
GRID, GRID_OF_CURVES = 17, 9  # values of each of two latent dimensions
INNER = 0.98  # share of the prior, or of the aggregate posterior, that such a grid spans
ENCODED = 2000  # test rows whose posterior the rate and the scatter are of
BATCH = 250  # of them at a time
THRESHOLD_RATES = (0.01, 0.05)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; height: auto; } figure { margin: 1.5rem 0; } figcaption { color: #555; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem .2rem 0; text-align: left; }
td { border-top: 1px solid #ddd; } .number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
"""


def report(run: Run, track: Track = untracked) -> Path:
    """Write runs/NAME/report/*.png and report.html; its path. Raises ExportError without a calibrated bundle."""
    bundle = open_staged(run, calibrated=True)
    drawn, images = draw(run, bundle.manifest), {}
    with track("report", len(drawn), "figures") as advance:
        for name, figure in drawn.items():
            images[name] = figures.png(figure)
            advance(1)
    folder = run.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for name, data in images.items():
        (folder / f"{name}.png").write_bytes(data)
    write_text(folder / "report.html", page(bundle.manifest, images))
    return folder / "report.html"


@torch.no_grad()
def draw(run: Run, manifest: Manifest) -> dict[str, Figure]:
    """The figures that say something of such a model, by name, in the order of the page."""
    model, test = run.model, run.dataset.splits["test"]
    seed = manifest.scores[manifest.default_score].seed
    pen = Pen(model, manifest)
    found: dict[str, Figure] = {}
    if run.checkpoint["history"]:
        found["loss"] = figures.loss_curves(run.checkpoint["history"], _panels(manifest), _unit(manifest))
    shows = manifest.backbone is None  # of features there is nothing to look at
    if manifest.has_distortion and shows:
        x = to_unit(run.dataset.pixels(test[:SHOWN]))
        target, loc, _ = posterior(model, x, seed)
        found["reconstructions"] = pen.reconstructions(x, target, loc)
    if model.prior.family != "none" and shows:
        found["samples"] = pen.samples()
    if manifest.has_distortion:
        parts = [test[i : i + BATCH] for i in range(0, min(ENCODED, len(test)), BATCH)]
        encoded = [posterior(model, pixels, seed)[1:] for pixels in pixel_batches(run.dataset, parts)]
        loc, scale = (torch.cat(batches) for batches in zip(*encoded, strict=True))
        labels = None if run.dataset.labels is None else run.dataset.labels[test[:ENCODED]]
        found |= _of_latents(pen, loc, scale, labels, run.dataset.label_names or [])
    return found | {f"score-{name}": figure for name, figure in _histograms(run, manifest).items()}


def _of_latents(pen: Pen, loc: Tensor, scale: Tensor, labels: np.ndarray | None, names: list[str]) -> dict[str, Figure]:
    """Traversal, rate, aggregate and plane from posterior moments [N,L] of the test rows, if these can be drawn."""
    model = pen.model
    mean, variance = moments(loc, scale)
    carried, kind = information(model, loc, scale)
    order = np.argsort(-carried, kind="stable")
    shows = pen.manifest.backbone is None
    if not figures.drawable(carried, loc.numpy(), mean.numpy(), variance.numpy()):
        return {}
    found = {"traversal": pen.traversal(order[:TRAVERSED], carried, kind, mean, variance)} if shows else {}
    if model.moments == "exact":
        found["rate"] = figures.rate_by_dimension(carried, *RATES[kind])
        centre, spread = (value.numpy() for value in prior_moments(model))
        found["aggregate"] = figures.aggregate(mean.numpy(), variance.numpy(), centre, spread, order)
    if model.latent_dim == 2 and shows:
        found["latent"] = pen.plane(loc.numpy(), labels, names)
    return found


RATES = {
    "rate": ("Rate of each latent dimension ({:.1f} nats in all)", "KL(q(z|x) ‖ p(z)) (nats)"),
    "information": ("What each latent dimension tells of x", "½ log Var q(z) − E log σ(x) (nats)"),
}


def information(model: LatentVariableModel, loc: Tensor, scale: Tensor) -> tuple[np.ndarray, str]:
    """What each latent dimension tells of x [L], from posterior moments [N,L], and which measure that is.

    ``rate``: the mean KL to N(0, 1), where that is the prior. ``information``: the mean KL to the Gaussian of the
    aggregate's moments, ½ log Var q(z_j) − E log σ_j, a bound on the mutual information with x under any prior.
    ``variance``: of loc, where scale is no posterior's deviation.
    """
    if model.moments != "exact":
        return loc.double().var(0).numpy(), "variance"
    if model.prior.family == "standard_normal" and model.posterior_family == "diagonal_gaussian":
        return Normal(loc, scale).kl_to_standard().mean(0).double().numpy(), "rate"
    told = 0.5 * torch.log(moments(loc, scale)[1]) - torch.log(scale.double()).mean(0)
    return told.numpy(), "information"


class Pen:
    """Draws what the model makes of latents: pictures of images, curves of vectors and signals.

    Vectors are drawn in standard deviations of the training data, for their numbers have units of their own.
    """

    def __init__(self, model: LatentVariableModel, manifest: Manifest) -> None:
        self.model, self.manifest = model, manifest
        rule = manifest.preprocessing
        self.is_image = rule.kind == "image"
        self.features = None if rule.kind == "image" else rule.features
        self.standardised = rule.kind == "vector"
        self.unit = "standard deviations" if self.standardised else "value"
        self.is_ex_post = manifest.evidence == "none"

    def values(self, x: Tensor) -> np.ndarray:
        """x or E[x|z] [N,C,H,W] in the figure's unit."""
        likelihood = self.model.likelihood
        return ((x - likelihood.shift) / likelihood.unit if self.standardised else x).numpy()

    def decode(self, z: Tensor) -> np.ndarray:
        """E[x|z] [...,C,H,W] of latents [...,L], in the figure's unit."""
        p = self.model.decode(z.reshape(-1, z.shape[-1]).float())
        mean = self.values(self.model.likelihood.mean(p))
        return mean.reshape(*z.shape[:-1], *mean.shape[1:])

    def reconstructions(self, x: Tensor, target: Tensor, loc: Tensor) -> Figure:
        """Test rows x, what the encoder saw of them, and E[x|z] at the posterior's mean."""
        if not self.is_image:
            return curves.reconstructions(self.values(x), self.decode(loc), self.features, self.unit)
        binarised = target.numpy() if self.model.likelihood.binarisation != "none" else None
        return figures.reconstructions(x.numpy(), binarised, self.decode(loc))

    def samples(self) -> Figure:
        """E[x|z] at seeded draws of the prior."""
        prior, count = self.model.prior, PRIOR_SAMPLES if self.is_image else PRIOR_CURVES
        choice = torch.from_numpy(noise.prior_choice(0, count)) if prior.choice else None
        mean = self.decode(prior.sample(torch.from_numpy(noise.prior_noise(0, count, prior.noise_dim)), choice))
        known = "E[x|z] at z ~ N(0, I)" if prior.family == "standard_normal" else "E[x|z] at draws of the prior"
        title = "Decoded draws of a density fitted to the codes afterwards" if self.is_ex_post else known
        if self.is_image:
            return figures.samples(mean, title)
        return curves.samples(mean, self.features, self.unit, title)

    def traversal(
        self, dimensions: np.ndarray, carried: np.ndarray, kind: str, mean: Tensor, variance: Tensor
    ) -> Figure:
        """E[x|z] as each dimension goes through STEPS deviations: the prior's if N(0, I), else the aggregate's."""
        if self.model.prior.family == "standard_normal":
            mean, variance = torch.zeros_like(mean), torch.ones_like(variance)
        z = mean.expand(len(dimensions), len(STEPS), -1).clone()
        for row, j in enumerate(dimensions.tolist()):
            z[row, :, j] += torch.from_numpy(STEPS) * variance[j].sqrt()
        unit = {"variance": "variance {:.2g}"}.get(kind, "{:.1f} nats")
        names = [f"z[{j}], {unit.format(carried[j])}" for j in dimensions.tolist()]
        if self.is_image:
            return figures.traversal(self.decode(z), STEPS.tolist(), names)
        return curves.traversal(self.decode(z), STEPS.tolist(), names, self.features, self.unit)

    def plane(self, loc: np.ndarray, labels: np.ndarray | None, names: list[str]) -> Figure:
        """Posterior means [N,2] and what the decoder makes of their plane."""
        standard = self.model.prior.family == "standard_normal"
        first, second = plane_values(loc, standard, GRID if self.is_image else GRID_OF_CURVES)
        z = torch.from_numpy(np.stack(np.meshgrid(first, second), -1))
        scale = "equal steps of the prior's probability" if standard else "the range of the test rows"
        values = (first.tolist(), second.tolist())
        if self.is_image:
            return figures.latent_plane(loc, labels, names, self.decode(z), values, scale)
        scatter = figures.latent_scatter(loc, labels, names, values, every=2)
        return curves.latent_plane(scatter, self.decode(z), values, scale)


def plane_values(loc: np.ndarray, standard: bool, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of z[0] and z[1] for a grid: quantiles of N(0, 1) (Kingma & Welling 2014, App. A), else loc's range."""
    shares = np.linspace(0.5 - INNER / 2, 0.5 + INNER / 2, count)
    if standard:
        quantiles = np.array([NormalDist().inv_cdf(share) for share in shares])
        return quantiles, quantiles
    low, high = np.quantile(loc, [shares[0], shares[-1]], axis=0)
    return np.linspace(low[0], high[0], count), np.linspace(low[1], high[1], count)


def _panels(manifest: Manifest) -> list[figures.Curves]:
    """What a training of such a model can be watched by."""
    if manifest.evidence == "none":
        return [figures.ERROR_CURVES]
    if not manifest.has_distortion:
        return [figures.EXACT_CURVES]
    return [figures.BOUND_CURVES, figures.RATE_CURVES, figures.DISTORTION_CURVES]


def _unit(manifest: Manifest) -> str:
    return manifest.scores[manifest.default_score].unit


def posterior(model: LatentVariableModel, x: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Target [N,C,H,W], loc and scale [N,L] of images x, with the dither that the service gives every image."""
    dither = torch.from_numpy(noise.dither(seed, model.shape).copy()).expand_as(x) if model.likelihood.dither else None
    target = model.likelihood.target(x, dither)
    q = model.encode(target)
    return target, q.loc, q.scale


def _histograms(run: Run, manifest: Manifest) -> dict[str, Figure]:
    with np.load(run.folder / SCORES, allow_pickle=False) as archive:
        scores = {name: archive[name] for name in archive.files}
    names = [key.removeprefix("test.") for key in scores if key.startswith("test.")]
    calibrator = Calibrator({name: scores[f"calibration.{name}"] for name in names})
    found = {}
    for name in names:
        held_out, test = scores[f"calibration.{name}"], scores[f"test.{name}"]
        if not figures.drawable(held_out, test):
            continue
        limits = thresholds(calibrator, name)
        found[name] = figures.score_histogram(held_out, test, limits, name, manifest.scores[name].unit)
    return found


def thresholds(calibrator: Calibrator, name: str) -> dict[float, float]:
    """Rate -> threshold in nats, for those of THRESHOLD_RATES that the calibration can answer."""
    found = {}
    for rate in THRESHOLD_RATES:
        try:
            found[rate] = calibrator.threshold(name, rate)
        except InvalidInput:  # too few calibration images for so small a rate: the page shows the others
            continue
    return found


CAPTIONS = {
    "loss": "While training; the validation curves are of the averaged weights.",
    "reconstructions": "Test rows and the mean of p(x|z) at the posterior's mean; between them what the encoder saw, "
    "where that differs.",
    "samples": "Means of p(x|z) at draws of the prior.",
    "traversal": "The latent dimensions that tell most, one each.",
    "rate": "What a dimension of nearly none tells is not used by the decoder.",
    "aggregate": "Where the aggregate posterior and the prior part, draws of the prior are not what the decoder knows.",
    "latent": "Left, where test rows lie in the latent plane, to scale; right, what the decoder makes of a grid of it: "
    "the lines on the left are the labelled values on the right.",
    "score-elbo": "Scores of inliers that the model was not trained on.",
    "score-iwae": "The same rows by the IWAE bound.",
}
EX_POST = (
    "Decoded draws of a density that was fitted to the training codes afterwards (ex post): the model has no prior."
)
OTHER_SCORE = "Scores of inliers that the model was not trained on."


def caption(name: str, manifest: Manifest) -> str:
    """What is said below a figure."""
    if name == "samples" and manifest.evidence == "none":
        return EX_POST
    if name == "reconstructions" and manifest.evidence == "none":
        return "Test rows and what the decoder makes of their codes."
    return CAPTIONS.get(name, OTHER_SCORE)


def page(manifest: Manifest, images: dict[str, bytes]) -> str:
    """The HTML page: metrics, calibration and figures, all inside."""
    blocks = [
        f"<figure><img alt='{html.escape(name)}' src='data:image/png;base64,{base64.b64encode(data).decode()}'>"
        f"<figcaption>{html.escape(caption(name, manifest))}</figcaption></figure>"
        for name, data in images.items()
    ]
    title = html.escape(f"{manifest.name}: report")
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<style>{STYLE}</style></head><body>\n<h1>{title}</h1><p>{html.escape(manifest.description)}.</p>\n"
        f"{_tables(manifest)}\n" + "\n".join(blocks) + "\n</body></html>\n"
    )


def _tables(manifest: Manifest) -> str:
    parts = []
    for split, metrics in manifest.provenance.metrics.items():
        title = f"Metrics, {split} split ({_unit(manifest)}, mean of a row, unless said)"
        parts.append(_table(title, ["metric", "value"], [[_words(n), rounded(v)] for n, v in metrics.items()]))
    if manifest.calibration:
        realised = manifest.calibration.realised_false_positive_rate
        asked = list(dict.fromkeys(rate for rates in realised.values() for rate in rates))
        header = ["score", *(f"asked {100 * float(rate):.3g}%" for rate in asked)]
        rows = [[name, *(f"{rates[r]:.2%}" if r in rates else "–" for r in asked)] for name, rates in realised.items()]
        parts.append(_table("Realised false-positive rates on the test split", header, rows))
    errors = [
        [_words(name), f"{error:.1e}" if error else "0"] for name, error in manifest.reference.max_abs_error.items()
    ]
    parts.append(_table("Torch against the served graphs", ["output", "largest |Δ|"], errors))
    return "\n".join(parts)


def _words(name: str) -> str:
    return name.replace("_", " ")


def rounded(value: float) -> str:
    """A number with the digits that it is good for: whole ones whole, two decimals from 1 on, three digits below."""
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.3g}"


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Names in the first column, numbers in the others; nothing without rows."""
    head = f"<th>{html.escape(header[0])}</th>" + "".join(
        f"<th class='number'>{html.escape(name)}</th>" for name in header[1:]
    )
    body = "".join(
        f"<tr><td>{html.escape(row[0])}</td>"
        + "".join(f"<td class='number'>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<h2>{html.escape(title)}</h2><table><tr>{head}</tr>{body}</table>" if rows else ""

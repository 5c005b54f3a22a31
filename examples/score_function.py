"""How noisy is the score-function gradient of an ELBO, next to the reparameterised one, at the same cost?

Both estimate the gradient of the ELBO with respect to the encoder's weights φ, from K posterior samples an image:

    reparameterised   ∇φ (1/K) Σ_k log w(z_k),  z_k = loc + scale·ε_k   (Kingma & Welling 2014, sec. 2.3)
    score function    (1/K) Σ_k log w(z_k) ∇φ log q(z_k|x)              (REINFORCE, Williams 1992)
    leave-one-out     the same with log w(z_k) − mean of the other K−1  (Mnih & Rezende 2016; Kool et al. 2019)

with log w(z) = log p(x|z) + log p(z) − log q(z|x). All three have the same expectation. A score-function sample is
cheaper, for nothing is differentiated but log q; so variances are compared times the seconds that a gradient takes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from torch import Tensor

from training.config import DataConfig, LikelihoodConfig, ModelConfig, NetworkConfig
from training.data import Dataset, load_dataset
from training.data.batches import to_unit
from training.distributions import Posterior
from training.fitting.objectives import elbo
from training.models.vae import VAE

Estimator = Callable[[VAE, Tensor, Tensor], Tensor]
"""A model, targets [N,C,H,W] and noise [N,K,L] -> a scalar whose gradient with respect to φ is the estimate."""

SAMPLES = (1, 4, 16, 64)


def log_weights(vae: VAE, target: Tensor, q: Posterior, z: Tensor) -> Tensor:
    """log w = log p(x|z) + log p(z) − log q(z|x), [N,K] at z [N,K,L], in nats."""
    log_p_x_given_z, _, log_p_z = vae.joint(target, z, vae.decode_samples(z))
    return log_p_x_given_z + log_p_z - q.log_prob(z)


def reparameterised(vae: VAE, target: Tensor, noise: Tensor) -> Tensor:
    """The ELBO itself: its gradient goes through z."""
    q = vae.encode(target)
    return log_weights(vae, target, q, q.rsample(noise).z).mean()


def score_function(vae: VAE, target: Tensor, noise: Tensor) -> Tensor:
    """log w as it is, times log q(z|x) at z held constant."""
    log_q, log_w = _scored(vae, target, noise)
    return (log_w * log_q).mean()


def leave_one_out(vae: VAE, target: Tensor, noise: Tensor) -> Tensor:
    """log w less what the other samples of the image say it is; K = 1 has no others, and takes it as it is."""
    log_q, log_w = _scored(vae, target, noise)
    k = noise.shape[1]
    others = (log_w.sum(1, keepdim=True) - log_w) / max(1, k - 1)
    return ((log_w - others) * log_q).mean()


def _scored(vae: VAE, target: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """log q(z|x), a function of φ, and log w, a number, each [N,K]."""
    q = vae.encode(target)
    with torch.no_grad():
        z = q.rsample(noise).z
        log_w = log_weights(vae, target, q, z)
    return q.log_prob(z), log_w


ESTIMATORS: dict[str, Estimator] = {
    "reparameterised": reparameterised,
    "score function": score_function,
    "score function, leave-one-out": leave_one_out,
}


def gradient(vae: VAE, estimator: Estimator, target: Tensor, noise: Tensor) -> Tensor:
    """One estimate of the gradient with respect to φ, flat."""
    weights = [*vae.encoder.parameters(), *vae.posterior.parameters()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(estimator(vae, target, noise), weights)])


@dataclass(frozen=True)
class Measured:
    """``variance`` of a gradient at K = ``k`` is summed over its components (nats²); ``seconds`` are of the CPU."""

    estimator: str
    k: int
    seconds: float
    variance: float


def measure(vae: VAE, name: str, target: Tensor, k: int, repeats: int) -> Measured:
    """The spread of ``repeats`` gradients at K = k samples, and the seconds that one of them takes, at the median."""
    draws, seconds = [], []
    for _ in range(repeats):
        noise = torch.randn(len(target), k, vae.latent_dim)
        started = time.process_time()
        draws.append(gradient(vae, ESTIMATORS[name], target, noise))
        seconds.append(time.process_time() - started)
    return Measured(name, k, median(seconds), float(torch.stack(draws).var(0).sum()))


def train(vae: VAE, dataset: Dataset, steps: int) -> None:
    """A short training, so that the gradients are those of a model at work."""
    optimiser = torch.optim.Adam(vae.parameters(), 2e-3)
    indices = torch.from_numpy(dataset.splits["train"])
    for _ in range(steps):
        x = to_unit(dataset.pixels(indices[torch.randint(len(indices), (64,))].numpy()))
        optimiser.zero_grad()
        (-elbo(vae(x, torch.randn(len(x), 1, vae.latent_dim)))).backward()
        optimiser.step()


def table(rows: list[Measured]) -> str:
    """The measurements as text; the last column is relative to the reparameterised gradient at K = 1."""
    first = next(row for row in rows if row.estimator == "reparameterised" and row.k == 1)
    lines = [f"{'estimator':<30}{'K':>4}{'ms':>8}{'variance':>12}{'variance × time, relative':>28}"]
    for row in rows:
        relative = row.variance * row.seconds / (first.variance * first.seconds)
        text = f"{row.estimator:<30}{row.k:>4}{1e3 * row.seconds:>8.2f}{row.variance:>12.4g}{relative:>28.3g}"
        lines.append(text)
    return "\n".join(lines)


def figure(rows: list[Measured], path: Path) -> None:
    """Variance against cost, a line an estimator, a point a K."""
    canvas = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = canvas.subplots()
    for name, marker in zip(ESTIMATORS, "os^", strict=True):
        own = [row for row in rows if row.estimator == name]
        milliseconds, variances = [1e3 * row.seconds for row in own], [row.variance for row in own]
        axes.loglog(milliseconds, variances, marker=marker, label=name)
        for row, x, y in zip(own, milliseconds, variances, strict=True):
            axes.annotate(f"K = {row.k}", (x, y), textcoords="offset points", xytext=(6, 5), fontsize=8)
    axes.set_xlabel("CPU milliseconds a gradient")
    axes.set_ylabel("variance of the encoder's gradient, nats²")
    axes.set_title("The ELBO's gradient on 8×8 digits, 32 images")
    axes.grid(alpha=0.3)
    axes.legend()
    canvas.savefig(path, dpi=130)


def build(latent_dim: int = 8) -> VAE:
    """A small VAE of binarised 8×8 digits: one hidden layer of 64 each way."""
    likelihood = LikelihoodConfig(family="bernoulli", binarisation="threshold")
    config = ModelConfig(latent_dim=latent_dim, network=NetworkConfig(hidden=[64]), likelihood=likelihood)
    return VAE((1, 8, 8), config)


def main() -> None:
    """Train, measure, print, draw."""
    parser = argparse.ArgumentParser(description="Variance of score-function and reparameterised gradients.")
    parser.add_argument("--steps", type=int, default=300, help="training steps before the measurement")
    parser.add_argument("--repeats", type=int, default=200, help="gradients an estimator and K")
    parser.add_argument("--out", type=Path, default=Path("score_function.png"), help="the figure")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dataset, vae = load_dataset(DataConfig(source="digits")), build()
    train(vae, dataset, options.steps)
    x = to_unit(dataset.pixels(dataset.splits["test"][:32]))
    target = vae.likelihood.target(x, None)
    rows = [measure(vae, name, target, k, options.repeats) for name in ESTIMATORS for k in SAMPLES]
    print(table(rows))
    figure(rows, options.out)
    print(f"figure: {options.out}")


if __name__ == "__main__":
    main()

"""Contributions of the latent dimensions to the rate: its KL divergences by dimension, nats.

    rate = E_q[log q(z|x) − log p(z)] = Σ_j KL(q(z_j|x) ‖ p(z_j)) + joint
    joint = E_q[log q(z|x) − Σ_j log q(z_j|x)] − E_q[log p(z) − Σ_j log p(z_j)]

This splits a divergence into those of its marginals and a part that lies between dimensions. The first term of
``joint`` is the total correlation of q (Watanabe 1960); Chen et al. 2018 (arXiv:1802.04942, eq. 2) split the aggregate
posterior in this way.
Where posterior and prior are both factorised ``joint`` is 0, and a dimension's KL is all that it adds. Under a flow or
a mixture the dimensions depend on each other, and ``joint`` may have either sign: a code whose dimensions fit together
costs less than they do one by one.

q(z_j|x) is Gaussian with the encoder's mean and deviation. p(z_j) is N(0, 1), or is estimated from draws of the prior:
a Gaussian kernel estimate (Silverman 1986, eq. 3.31) of weight 1 − 1/n, and the Gaussian of twice the draws' deviation
of weight 1/n, since all that n draws say of what lies beyond them is that its probability is below about 1/n.
"""

from __future__ import annotations

import numpy as np

from service.bundle.manifest import Manifest

DRAWS = 4096
BINS = 1024
"""Bins of a dimension's draws: some 20 for each kernel's width."""
NODES, WEIGHTS = np.polynomial.hermite.hermgauss(24)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
LOG_2PI = float(np.log(2 * np.pi))
MIN_SCALE = 1e-6


class PriorMarginals:
    """Estimates of p(z_j) for every latent dimension j, from ``draws`` of the prior, float32 [n,L]."""

    def __init__(self, draws: np.ndarray) -> None:
        columns = draws.astype(np.float64).T
        self._share = 1 / columns.shape[1]
        self._mean, self._scale = columns.mean(axis=1), np.maximum(columns.std(axis=1), MIN_SCALE)
        self._kernels = [_kernel_estimate(column) for column in columns]

    def log_prob(self, dimension: int, values: np.ndarray) -> np.ndarray:
        """log p(z_j) in nats at finite values, float64 of any shape."""
        grid, density = self._kernels[dimension]
        near = (1 - self._share) * np.interp(values, grid, density, left=0.0, right=0.0)
        wide = 2 * self._scale[dimension]
        tail = np.log(self._share) - 0.5 * ((values - self._mean[dimension]) / wide) ** 2 - np.log(wide) - LOG_2PI / 2
        with np.errstate(divide="ignore"):
            return np.logaddexp(np.log(near), tail)


def divergences(loc: np.ndarray, scale: np.ndarray, marginals: PriorMarginals | None) -> np.ndarray:
    """KL(q(z_j|x) ‖ p(z_j)) in nats, float64 [N,L], for ``loc`` and ``scale`` of q, [N,L] each.

    Without ``marginals`` p(z_j) is N(0, 1), and the form is closed (Kingma & Welling 2014, appendix B); with them it is
    Gauss–Hermite quadrature over q.
    """
    loc, scale = loc.astype(np.float64), np.maximum(scale.astype(np.float64), MIN_SCALE)
    if marginals is None:
        return 0.5 * (loc**2 + scale**2 - 1) - np.log(scale)
    nats = np.empty(loc.shape)
    for j in range(loc.shape[1]):
        nats[:, j] = -_expected(marginals, j, loc[:, j], scale[:, j]) - 0.5 * (LOG_2PI + 1) - np.log(scale[:, j])
    return nats


def is_standard_normal(manifest: Manifest) -> bool:
    """True if the manifest's p(z) is N(0, I)."""
    return manifest.prior.family == "standard_normal"


def _expected(marginals: PriorMarginals, dimension: int, loc: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """E[log p(z_j)] under N(loc, scale²), float64 [N]; summed node by node, so that rows stay independent, bitwise."""
    total = np.zeros(len(loc))
    for node, weight in zip(NODES, WEIGHTS, strict=True):
        total += weight * marginals.log_prob(dimension, loc + np.sqrt(2) * scale * node)
    return total


def _kernel_estimate(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kernel density estimate of one dimension's draws [n]: points of a grid, and the density at each.

    The draws are binned, and the bins smoothed.
    """
    upper, lower = np.quantile(draws, (0.75, 0.25))
    spread = min(draws.std(), (upper - lower) / 1.34) or draws.std()
    width = max(0.9 * spread * len(draws) ** -0.2, MIN_SCALE)
    edges = np.linspace(draws.min() - 4 * width, draws.max() + 4 * width, BINS + 1)
    step = edges[1] - edges[0]
    counts = np.histogram(draws, edges)[0]
    reach = np.arange(-int(np.ceil(4 * width / step)), int(np.ceil(4 * width / step)) + 1)
    kernel = np.exp(-0.5 * (reach * step / width) ** 2)
    smooth = np.convolve(counts, kernel / kernel.sum())[len(reach) // 2 :][:BINS]
    return (edges[:-1] + edges[1:]) / 2, smooth / (len(draws) * step)

"""A Gaussian mixture fitted to codes that are there already: the ex-post prior of a deterministic autoencoder."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from training.config import MixtureConfig
from training.errors import ConfigError
from training.models.priors import Prior, chosen, log_standard_normal

BATCH = 1000  # codes at a time
ITERATIONS = 200  # of EM; it stops earlier once the mean log density gains less than 1e-3


class MixturePrior(Prior):
    """Σ_j w_j N(loc_j, A_j A_jᵀ), by EM on training codes (ex-post density estimation, Ghosh et al. 2020, sec. 4).

    It plays no part in training, so that its log density bounds no evidence. Until ``fit`` it is N(0, I).
    """

    family = "gaussian_mixture"
    choice = True

    def __init__(self, latent_dim: int, config: MixtureConfig) -> None:
        super().__init__()
        self.config = config
        self.noise_dim = latent_dim
        count, identity = config.components, torch.eye(latent_dim, dtype=torch.float64)
        self.weights: Tensor
        self.loc: Tensor
        self.factor: Tensor
        self.inverse_factor: Tensor
        self.register_buffer("weights", torch.full((count,), 1 / count, dtype=torch.float64))
        self.register_buffer("loc", torch.zeros(count, latent_dim, dtype=torch.float64))
        self.register_buffer("factor", identity.repeat(count, 1, 1))
        self.register_buffer("inverse_factor", identity.repeat(count, 1, 1))

    def log_prob(self, z: Tensor) -> Tensor:
        """Whitened by all components in one matrix product: z [...,L] -> [...,J,L] -> [...] float64."""
        whitened = (z.double() @ self._stacked(self.inverse_factor)).unflatten(-1, self.loc.shape)
        whitened = whitened - (self.inverse_factor @ self.loc.unsqueeze(-1)).squeeze(-1)
        log_det = torch.log(torch.diagonal(self.factor, dim1=-2, dim2=-1)).sum(-1)
        return torch.logsumexp(torch.log(self.weights) - log_det + log_standard_normal(whitened).sum(-1), -1)

    def sample(self, noise: Tensor, choice: Tensor | None = None) -> Tensor:
        assert choice is not None, "a mixture wants a choice"
        picked = chosen(choice, self.weights, torch.eye(len(self.weights), dtype=self.weights.dtype))
        draws = self.loc + (noise.double() @ self._stacked(self.factor)).unflatten(-1, self.loc.shape)
        return (picked.unsqueeze(-1) * draws).sum(1).float()

    def _stacked(self, factors: Tensor) -> Tensor:
        """[J,L,L] -> [L,J·L]: by it a row times each factor's transpose is one product."""
        return factors.permute(2, 0, 1).flatten(1)

    @torch.no_grad()
    def fit(self, codes: Tensor, seed: int) -> str:
        """EM on codes [n,L], standardised meanwhile so that no scale of them is special; what came of it, in words.

        Raises ConfigError: fewer codes than components.
        """
        count = self.config.components
        if len(codes) < count:
            raise ConfigError(f"model.autoencoder.mixture.components: {count} of {len(codes)} codes, expected no more")
        shift, unit = codes.double().mean(0), codes.double().std(0, correction=0)
        unit = torch.where(unit > 0, unit, 1.0)
        kind = {"full": "full", "diagonal": "diag"}[self.config.covariance]
        mixture = GaussianMixture(count, covariance_type=kind, max_iter=ITERATIONS, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # said below
            mixture.fit(((codes.double() - shift) / unit).numpy())
        covariances = mixture.covariances_ if kind == "full" else np.stack([np.diag(c) for c in mixture.covariances_])
        self.weights.copy_(torch.from_numpy(mixture.weights_))
        self.loc.copy_(shift + unit * torch.from_numpy(mixture.means_))
        self.factor.copy_(unit.unsqueeze(-1) * torch.linalg.cholesky(torch.from_numpy(covariances)))
        self.inverse_factor.copy_(torch.linalg.inv(self.factor))
        ended = f"after {mixture.n_iter_} iterations" if mixture.converged_ else f"not converged in {ITERATIONS}"
        mean = float(torch.cat([self.log_prob(part) for part in codes.split(BATCH)]).mean())
        return f"{count} Gaussians fitted to {len(codes)} codes, {ended}: log p(z) {mean:.2f} nats on average"

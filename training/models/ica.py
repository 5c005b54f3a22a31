"""Maximum-likelihood independent component analysis: z = W (t − c), log p(t) = log |det W| + Σ log p(z_i)."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator

import torch
from torch import Tensor, nn

from training.config import IcaConfig, ModelConfig
from training.distributions import Distribution
from training.distributions.logistic import STANDARD_DEVIATION
from training.errors import DataError
from training.models.base import BijectiveModel, Rows
from training.models.moments import first_rows, principal_axes, target_batches, target_moments
from training.models.priors import ExtendedSources, LogisticSources
from training.nn.networks import Shape

ROWS = 1000  # at a time
SMALLEST_VARIANCE = 1e-10
"""Of the largest: axes of less are taken for linear dependence. Dequantised pixels keep above by their dither alone."""
ROUND, PATIENCE, CHUNK = 10, 3, 2000  # iterations between looks at the validation split; rounds without gain; rows


SOURCES: dict[str, type[LogisticSources]] = {"logistic": LogisticSources, "extended": ExtendedSources}


class Unmixing:
    """The search for B and c in s = B w + c, maximising log |det B| + Σ log p(s_i) over whitened rows w, by L-BFGS."""

    def __init__(self, sources: LogisticSources, rows: Tensor, held_out: Tensor) -> None:
        self.sources, self.rows, self.held_out = sources, rows, held_out
        self.unmixing = nn.Parameter(STANDARD_DEVIATION * torch.eye(rows.shape[1]))
        self.offset = nn.Parameter(torch.zeros(rows.shape[1]))

    def loss(self, rows: Tensor, backward: bool = False) -> Tensor:
        """−mean log p(w) of rows [B,D], chunk by chunk; ``backward`` adds its gradient to the parameters'."""
        with torch.set_grad_enabled(backward):
            total = -torch.linalg.slogdet(self.unmixing.double())[1]
            if backward:
                total.backward()
            for chunk in rows.split(CHUNK):
                s = chunk @ self.unmixing.T + self.offset
                part = -self.sources.log_density(s).sum(dtype=torch.float64) / len(rows)
                if backward:
                    part.backward()
                total = total.detach() + part.detach()
        return total

    def optimiser(self) -> torch.optim.LBFGS:
        """A new L-BFGS optimiser, whose memory of the curvature is that of the present densities."""
        return torch.optim.LBFGS(
            [self.unmixing, self.offset],
            max_iter=ROUND,
            max_eval=2 * ROUND,
            tolerance_grad=1e-9,
            tolerance_change=1e-12,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

    def fit(self, options: IcaConfig) -> Generator[str, None, tuple[Tensor, Tensor]]:
        """Search for the B [D,D] and c [D] of best held-out log p(w), float64; the sources keep their densities there.

        Yields, in words, where each round of the search stands.
        """
        optimiser = self.optimiser()
        best, kept, without_gain = -math.inf, self._state(), 0
        for iteration in range(0, options.iterations, ROUND):
            with torch.no_grad():
                changed = self.sources.choose(self.rows[: 5 * CHUNK] @ self.unmixing.T + self.offset)
            if changed:
                optimiser = self.optimiser()
            optimiser.step(self._closure)
            log_p = -float(self.loss(self.held_out))
            without_gain = 0 if changed or log_p > best + options.tolerance else without_gain + 1
            if log_p > best:
                best, kept = log_p, self._state()
            yield f"L-BFGS: {iteration + ROUND} iterations, held-out log p of whitened rows {log_p:.4f} nats"
            if without_gain == PATIENCE:
                break
        unmixing, offset, densities = kept
        self.sources.load_state_dict(densities)
        return unmixing.double(), offset.double()

    def _closure(self) -> float:
        self.unmixing.grad = self.offset.grad = None
        return float(self.loss(self.rows, backward=True))

    def _state(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        densities = {name: value.clone() for name, value in self.sources.state_dict().items()}
        return self.unmixing.detach().clone(), self.offset.detach().clone(), densities


class ICA(BijectiveModel):
    """z = W (t − c) with independent z_i of an explicit density, as many as there are numbers in the target t.

    Encoder and decoder are each other's inverse, log p(x|z) = 0 and log q(z|x) = −log |det W| − log_volume, so that
    every estimator is log p(x) (MacKay 1996; Hyvärinen et al. 2001, sec. 9.1). Fitted by L-BFGS from the symmetric
    (ZCA) whitening, where the problem is well conditioned at 784 pixels too, early-stopped on the validation split.
    Raises ConfigError: another likelihood than delta.

    >>> from training.config import LikelihoodConfig
    >>> ica = ICA((1, 4, 4), ModelConfig(family="ica", likelihood=LikelihoodConfig(family="delta")))
    >>> ica.decode(torch.zeros(3, 16)).mean.shape
    torch.Size([3, 1, 4, 4])
    """

    family = "ica"
    title = "independent component analysis"
    closed_form = True
    prior: LogisticSources

    def __init__(self, shape: Shape, config: ModelConfig) -> None:
        super().__init__(shape, config)
        self.options = config.ica
        self.prior = SOURCES[config.ica.source](self.latent_dim)
        self.weight = nn.Parameter(torch.eye(self.latent_dim))
        self.loc = nn.Parameter(torch.zeros(self.latent_dim))
        self.inverse: Tensor
        self.ladj: Tensor
        self.register_buffer("inverse", torch.eye(self.latent_dim))
        self.register_buffer("ladj", torch.zeros((), dtype=torch.float64))

    def call_and_ladj(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """z by float64, because rows of W are large where x is still."""
        z = ((target.flatten(1).double() - self.loc.double()) @ self.weight.double().T).float()
        return z, (self.ladj + self.likelihood.log_volume).expand(z.shape[0])

    def decode(self, z: Tensor) -> Distribution:
        raw = z.double() @ self.inverse.double().T + self.loc.double()
        p: Distribution = self.likelihood(raw.unflatten(1, (1, *self.shape)))
        return p

    @torch.no_grad()
    def set_values(self, weight: Tensor, loc: Tensor) -> None:
        """Take W [D,D] and c [D], and what follows from them as rounded to float32."""
        self.weight.copy_(weight)
        self.loc.copy_(loc)
        self.inverse.copy_(torch.linalg.inv(self.weight.double()))
        self.ladj.copy_(torch.linalg.slogdet(self.weight.double())[1])

    def finish(self, train: Rows, validation: Rows, seed: int) -> Iterator[str]:
        """Whiten, unmix, and multiply the two. Raises DataError: linearly dependent numbers."""
        moments = target_moments(train.batches(ROWS), self.likelihood)
        variances, axes = principal_axes(moments.covariance)
        if variances[-1] <= SMALLEST_VARIANCE * variances[0]:
            raise DataError(
                f"ica expects linearly independent numbers: the training covariance has variances from "
                f"{variances[0]:.3g} down to {variances[-1]:.3g}; remove constant or redundant ones"
            )
        whitening = (axes / torch.sqrt(variances)) @ axes.T
        generator = torch.Generator().manual_seed(seed)

        def whitened(rows: Rows) -> Tensor:
            first = first_rows(rows.batches(ROWS), self.options.rows)
            targets = target_batches(first, self.likelihood, generator)
            return torch.cat([((batch.double() - moments.mean) @ whitening).float() for batch in targets])

        search = Unmixing(self.prior, whitened(train), whitened(validation))
        unmixing, offset = yield from search.fit(self.options)
        weight = unmixing @ whitening
        self.set_values(weight, moments.mean - torch.linalg.solve(weight, offset))

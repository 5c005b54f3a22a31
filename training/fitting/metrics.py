"""Metrics of an epoch: the sampled terms of the training batches, and the validation bound."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.config import Config
from training.data.dataset import Dataset
from training.evaluation.evaluate import bounds
from training.models.base import LatentVariableModel, Terms

SAMPLED = ("train_elbo_sampled", "train_rate_sampled", "train_distortion_sampled")
"""Names of ``Sums.means``, which are of log w at the drawn samples, whatever the objective."""


@dataclass
class Sums:
    """Sums of one epoch's batch means, kept on the device so that no step waits for it.

    ``values``: ELBO, rate and distortion [3], each of the sampled log w; ``kl``: the terms' KL by group [G].
    """

    values: Tensor
    steps: int = 0
    kl: Tensor | None = None

    @classmethod
    def zero(cls, device: torch.device) -> Sums:
        """The sums of no batch."""
        return cls(torch.zeros(3, device=device))

    def add(self, terms: Terms) -> None:
        """Add a batch's means."""
        with torch.no_grad():
            rate = (terms.log_q_z - terms.log_p_z).mean()
            distortion = -terms.log_p_x_given_z.mean()
            self.values += torch.stack([-distortion - rate, rate, distortion])
            kl = terms.kl.per_group.mean(0)
            self.kl = kl if self.kl is None else self.kl + kl
        self.steps += 1

    @property
    def means(self) -> Tensor:
        """Mean ELBO, rate, distortion so far [3], on the device."""
        return self.values / max(1, self.steps)


def validate(model: LatentVariableModel, dataset: Dataset, config: Config) -> dict[str, float]:
    """The validation split under ``model``: ``bound`` is the ELBO, or IWAE at the objective's K (β = 1)."""
    objective, indices = config.objective, dataset.splits["validation"]
    means = bounds(model.eval(), dataset, indices, objective.samples, config.evaluate.chunk).means()
    if model.evidence == "none":  # no prior yet, and no rate ever
        means |= {"elbo": -means["distortion"], "rate": 0.0}
    bound = means["elbo"] if objective.kind == "elbo" else means["iwae"]
    return {"bound": bound, "elbo": means["elbo"], "rate": means["rate"], "distortion": means["distortion"]}

"""How large a batch may be: of few rows a preset's batch makes so few steps an epoch that the weights hardly move.

On 619 small digits the preset ``one-class`` made 4 steps an epoch, and the model it ended with told odd digits from
even ones with AUROC .86, mean of three seeds; in batches of 27 it is .94 (docs/log.md).
"""

from __future__ import annotations

from training.config import Config

STEPS = 20  # an epoch, at least
LEAST = 16  # rows: gradients of fewer are mostly noise


def adapted(config: Config, rows: int) -> Config:
    """``config`` with a preset's ``optimiser.batch_size`` brought down to what gives STEPS an epoch of so many rows."""
    most = max(LEAST, rows // STEPS)
    return config if config.optimiser.batch_size <= most else with_batch_size(config, most)


def with_batch_size(config: Config, batch_size: int) -> Config:
    """``config`` with that ``optimiser.batch_size``."""
    return config.model_copy(update={"optimiser": config.optimiser.model_copy(update={"batch_size": batch_size})})

"""``vaeserve autotune``: measure the layouts of a service on this machine, choose one, say it in a table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime

from rich.table import Table

from service.bundle.files import find_bundles
from service.errors import BundleNotFound, ConfigurationError, ModelNotFound
from service.resources import available_cpus, available_memory
from service.server.layouts import DOUBTFUL_TIE, TIE, Layout, Measured, MiB, choose, starved
from service.server.tuned import Tuned, conditions
from service.server.tuning import measure_at_length
from service.settings import Settings


def autotune(settings: Settings, model: str | None, seconds: float, told: Callable[[Layout], None]) -> Tuned:
    """Measure each layout for some ``seconds``, computing all models or the one of that name, and choose.

    ``told`` is called with each layout before it is measured.

    Raises:
        BundleNotFound, ModelNotFound: there is nothing to compute.
        MeasurementFailed: a bundle cannot be loaded, or a process has died.
        ConfigurationError: this system has no several workers.
    """
    if sys.platform != "linux":
        raise ConfigurationError("only Linux spreads connections over several processes: there is nothing to choose")
    now, cpus, memory = conditions(settings), available_cpus(), available_memory()
    measured = measure_at_length(settings, _models(settings, model), cpus, memory, seconds, told)
    share = starved(measured)
    choice = choose(measured, cpus, memory, TIE if share is None else DOUBTFUL_TIE)
    note = "" if share is None else f"; others took the CPUs ({share:.0%} of the time was ours): measure again"
    return Tuned(
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        conditions=now,
        choice=choice.layout,
        why=choice.why + note,
        shares={str(layout): share for layout, share in choice.shares.items()},
        measured=measured,
    )


def _models(settings: Settings, model: str | None) -> list[str]:
    names = sorted({path.parent.name for path in find_bundles(settings.repository)})
    if not names:
        raise BundleNotFound(f"no bundle under {settings.repository}: expected NAME/VERSION/manifest.json")
    if model is not None and model not in names:
        raise ModelNotFound(f"no model {model!r} is there: {', '.join(names)}")
    return names if model is None else [model]


def table_of(tuned: Tuned) -> Table:
    """A column for each layout, a row for each workload."""
    measured = tuned.measured
    table = Table("processes × threads")
    for each in measured:
        table.add_column(f"{each.layout}{' ← chosen' if each.layout == tuned.choice else ''}", justify="right")
    for workload in measured[0].rates:
        table.add_row(_named(workload), *(_rate(each, workload) for each in measured))
    table.add_section()
    table.add_row("share of the best images/s", *(f"{tuned.shares[str(each.layout)]:.2f}" for each in measured))
    table.add_row("MiB a process, at most", *(f"{each.process_bytes / MiB:.0f}" for each in measured))
    return table


def _named(workload: str) -> str:
    model, verb, rows = workload.rsplit(" ", 2)
    return f"{model} {verb}, {'one row' if rows == '1' else f'{rows} rows'}"


def _rate(measured: Measured, workload: str) -> str:
    rate = measured.rates[workload]
    return f"{rate.images_per_second:.0f}/s {1000 * rate.latency:.2f} ms"

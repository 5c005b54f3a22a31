"""The tables of the anomaly benchmark, in Markdown: a column for each detector, mean over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from types import MappingProxyType
from typing import NamedTuple

from bench.anomaly.measures import RATE
from bench.anomaly.ours import Ours
from bench.anomaly.results import Record
from bench.anomaly.rivals import RIVALS

DETECTORS = (Ours.name, *(rival.name for rival in RIVALS.values()))
NOTHING = "–"
NO_COLUMNS: Mapping[str, str] = MappingProxyType({})


class Row(NamedTuple):
    """A row of the summary: ``count`` tasks of a group, or whose names match ``pattern``, reduced by ``over``, and what
    that should reach."""

    title: str
    pattern: str
    count: int
    over: Callable[[Iterable[float]], float]
    floor: float
    aim: float
    measure: str = "auroc"


ROWS = (
    Row("Fashion-MNIST in, MNIST out", "fashion-mnist/mnist", 1, statistics.fmean, 0.99, 1.0),
    Row("MNIST in, Fashion-MNIST out", "mnist/fashion-mnist", 1, statistics.fmean, 0.999, 1.0),
    Row("worst pair", "pairs", 16, min, 0.90, 0.97),
    Row("even digits in, odd out", "mnist-even/odd", 1, statistics.fmean, 0.75, 0.85),
    Row("odd digits in, even out", "mnist-odd/even", 1, statistics.fmean, 0.75, 0.85),
    Row("one class of MNIST against the rest, mean of ten", "mnist-[0-9]/rest", 10, statistics.fmean, 0.965, 0.98),
    Row("one class of Fashion-MNIST, mean of ten", "fashion-mnist-[0-9]/rest", 10, statistics.fmean, 0.92, 0.94),
    Row("defects on Fashion-MNIST, by image", "defects", 4, statistics.fmean, 0.90, 0.97),
    Row("defects on Fashion-MNIST, by pixel", "defects", 4, statistics.fmean, 0.90, 0.97, "pixel_auroc"),
)


def markdown(records: Sequence[Record]) -> str:
    """All tables that the records allow."""
    parts = [
        ("AUROC", summary(records)),
        ("Every task", every_task(records)),
        ("Maps: AUROC by pixel", by_pixel(records)),
        (f"Unseen inliers: rate of p ≤ {RATE:g}, and uniformity", unseen(records)),
        ("Every score of the bundles: AUROC", every_score(records)),
        ("Settings", settings(records)),
    ]
    return "\n".join(f"### {title}\n\n{text}\n" for title, text in parts if text)


def summary(records: Sequence[Record]) -> str:
    """The rows of ROWS; a detector that was not run on all tasks of a row has no number there."""
    names = detectors(records)
    rows = []
    for row in ROWS:
        values = [reduced(records, name, row) for name in names]
        if any(value is not None for value in values):
            rows.append([row.title, f"{row.floor:g}", f"{row.aim:g}", *map(shown, values)])
    return table(["task", "floor", "aim", *names], rows)


def reduced(records: Sequence[Record], detector: str, row: Row) -> float | None:
    """A row's number for a detector: over its tasks the row's way, of means over seeds."""
    tasks = dict.fromkeys(record.task for record in records if matches(record, row.pattern))
    means = [mean_over_seeds(records, detector, task, row.measure) for task in tasks]
    found = [value for value in means if value is not None]
    return row.over(found) if len(found) == row.count else None


def every_task(records: Sequence[Record]) -> str:
    """AUROC by task and detector, the seeds' standard deviation behind where there are several."""
    return by_task(records, "auroc")


def by_pixel(records: Sequence[Record]) -> str:
    """AUROC of the maps, where masks are known; that of our corruption map in a column of its own, where measured."""
    known = [record for record in records if record.pixel_auroc is not None]
    measured = any(record.corruption_pixel_auroc is not None for record in known)
    return by_task(known, "pixel_auroc", {"corruption map": "corruption_pixel_auroc"} if measured else {})


def by_task(records: Sequence[Record], measure: str, ours: Mapping[str, str] = NO_COLUMNS) -> str:
    """A row a task, a column a detector, and one each of further measures of ours, by title."""
    names = detectors(records)
    columns = [(name, measure) for name in names] + [(Ours.name, further) for further in ours.values()]
    tasks = dict.fromkeys(record.task for record in records if getattr(record, measure) is not None)
    rows = [[task, *(shown_seeds(values_of(records, name, task, of)) for name, of in columns)] for task in tasks]
    return table(["task", *names, *ours], rows)


def unseen(records: Sequence[Record]) -> str:
    """Error rates by inliers and seed: as served, and for every split anew."""
    rows = [
        [
            record.task,
            str(record.seed),
            name,
            f"{rate['n_calibration']:,.0f} / {rate['n']:,.0f}",
            f"{rate['rate']:.2%} ± {rate['standard_error']:.2%}",
            "yes" if rate["rate"] <= RATE + 2 * rate["standard_error"] else "no",
            f"{rate['ks']:.3f}",
        ]
        for record in records
        for name, rate in record.rates.items()
    ]
    head = ["inliers", "seed", "calibration", "n calibration / unseen", "rate ± s.e.", "within 2 s.e.", "KS p"]
    return table(head, rows)


def every_score(records: Sequence[Record]) -> str:
    """AUROC of every score that the bundles define, by task, mean over seeds."""
    ours = [record for record in records if record.by_score]
    names = list(dict.fromkeys(name for record in ours for name in record.by_score))
    rows = []
    for task in dict.fromkeys(record.task for record in ours):
        of_task = [record for record in ours if record.task == task]
        cells = [[record.by_score[name] for record in of_task if name in record.by_score] for name in names]
        rows.append([task, *(shown(statistics.fmean(cell)) if cell else NOTHING for cell in cells)])
    return table(["task", *names], rows)


def settings(records: Sequence[Record]) -> str:
    """What was run, by detector, and what it took."""
    rows = []
    for name in detectors(records):
        own = [record for record in records if record.detector == name]
        texts = dict.fromkeys(record.settings for record in own)
        said = "; ".join(texts) if len(texts) < 4 else f"{next(iter(texts))}, and {len(texts) - 1} others alike"
        rows.append([name, said, f"{max(record.fit_seconds for record in own):.0f} s"])
    return table(["detector", "settings", "longest fit"], rows)


def detectors(records: Sequence[Record]) -> list[str]:
    """Detectors with results, ours first."""
    found = {record.detector for record in records}
    return [name for name in DETECTORS if name in found]


def matches(record: Record, pattern: str) -> bool:
    """Whether a record is of that group, or its task's name matches."""
    return record.outlying and (record.group == pattern or fnmatch(record.task, pattern))


def values_of(records: Sequence[Record], detector: str, task: str, measure: str) -> list[float]:
    """A detector's numbers on a task, a seed each."""
    own = (getattr(record, measure) for record in records if (record.detector, record.task) == (detector, task))
    return [value for value in own if value is not None]


def mean_over_seeds(records: Sequence[Record], detector: str, task: str, measure: str = "auroc") -> float | None:
    """The mean of those, or None."""
    values = values_of(records, detector, task, measure)
    return statistics.fmean(values) if values else None


def shown(value: float | None) -> str:
    """An AUROC in a table."""
    return NOTHING if value is None else f"{value:.4f}"


def shown_seeds(values: list[float]) -> str:
    """Mean, and the standard deviation over seeds."""
    if not values:
        return NOTHING
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return shown(statistics.fmean(values)) + spread


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, empty without rows; the first column is words."""
    if not rows:
        return ""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))

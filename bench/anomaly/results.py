"""What was measured: one record for each task, detector and seed, in a JSON file that grows by every one of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from training.runs import write_text


class Key(NamedTuple):
    """What a record is found by."""

    task: str
    detector: str
    seed: int
    limit: int | None


class Record(BaseModel):
    """One detector on one task. ``auroc`` is None where there are no outliers, ``pixel_auroc`` without masks or maps.

    ``corruption_pixel_auroc`` is that of the corruption map, None where a bundle has none or it was not measured.
    ``by_score`` has the AUROC of every score that the bundle defines, ``rates`` the error rates on unseen inliers (see
    bench.anomaly.measures.Rates); these three are ours alone. Seconds are of one thread.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    group: str
    detector: str
    settings: str
    seed: int
    limit: int | None
    n_train: int
    n_inliers: int
    n_outliers: int
    auroc: float | None
    pixel_auroc: float | None = None
    corruption_pixel_auroc: float | None = None
    by_score: dict[str, float] = {}
    rates: dict[str, dict[str, float]] = {}
    fit_seconds: float
    score_seconds: float

    @property
    def outlying(self) -> bool:
        """Whether there were outliers to find."""
        return self.auroc is not None

    @property
    def key(self) -> Key:
        """What it is found by."""
        return Key(self.task, self.detector, self.seed, self.limit)


class Results:
    """Records by key, as they lie in ``path``; later ones replace earlier ones. ``path`` None keeps them in memory."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._records: dict[Key, Record] = {}
        if path is not None and path.is_file():
            self.take(read_records(path))

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def take(self, records: Iterable[Record]) -> None:
        """Add records, and write all."""
        self._records |= {record.key: record for record in records}
        if self._path is not None:
            listed: list[dict[str, Any]] = [record.model_dump() for record in self]
            write_text(self._path, json.dumps({"records": listed}, indent=1) + "\n")


def read_records(path: Path) -> list[Record]:
    """The records of a file. Raises OSError, ValueError (another JSON than ours)."""
    content = json.loads(path.read_text())
    return [Record.model_validate(record) for record in content["records"]]

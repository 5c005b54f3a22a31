"""Outlier detection on the tasks of docs/anomaly.md: ours, as served, beside the linear floor and the peers.

    python -m bench.anomaly                                        # everything, three seeds: hours of one core
    python -m bench.anomaly --tasks pairs 'mnist-3/*' --detectors ours ppca --seeds 0
    python -m bench.anomaly --limit 64 --seeds 0 --set optimiser.epochs=1         # a smoke test

What is measured goes to DIR/results.json at once, and is not measured again by the next command unless ``--again``.
The Markdown tables of all that the file holds at the same --limit are printed, and written to DIR/report.md, the figure
to DIR/auroc.png.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from bench.anomaly.figure import dots
from bench.anomaly.measures import auroc, pixel_auroc
from bench.anomaly.ours import BundleMissing, Ours
from bench.anomaly.report import markdown
from bench.anomaly.results import Key, Record, Results, read_records
from bench.anomaly.rivals import RIVALS, Detector, Maps, NotInstalled
from bench.anomaly.task import Inliers, Task
from bench.anomaly.tasks import GROUPS, Suite, load_sources
from service.errors import VaeserveError
from training.errors import TrainingError
from training.reporting.figures import png
from training.runs import write_text

OURS = "ours"
DETECTORS = (OURS, *RIVALS)


class Fitted:
    """A detector fitted on inliers, and what it makes of the held-out ones, computed once for all their tasks."""

    def __init__(self, detector: Detector, inliers: Inliers, seed: int) -> None:
        started = time.perf_counter()
        detector.fit(inliers, seed)
        self.fit_seconds = time.perf_counter() - started
        self.detector, self.inliers, self.seed = detector, inliers, seed
        self._held_out: dict[str, np.ndarray] | None = None
        self._maps: dict[str, Maps] = {}

    def record(self, task: Task, limit: int | None) -> Record:
        """The detector on that task of its inliers."""
        started = time.perf_counter()
        measured = self._inliers_alone() if task.outliers is None else self._against(task)
        return Record(
            task=task.name,
            group=task.group,
            detector=self.detector.name,
            settings=self.detector.settings,
            seed=self.seed,
            limit=limit,
            n_train=len(self.inliers.train),
            n_inliers=len(self.inliers.held_out),
            fit_seconds=round(self.fit_seconds, 2),
            score_seconds=round(time.perf_counter() - started, 2),
            **measured,
        )

    def _inliers_alone(self) -> dict:
        rates = {}
        if isinstance(self.detector, Ours):
            found = self.detector.unseen(self.held_out[self.detector.default])
            rates = {name: rate._asdict() for name, rate in found.items()}
        return {"n_outliers": 0, "auroc": None, "rates": rates}

    def _against(self, task: Task) -> dict:
        assert task.outliers is not None
        images, masks = task.outliers()
        scores = self._scores(images)
        by_score = {name: auroc(self.held_out[name], found) for name, found in scores.items()}
        default = next(iter(scores)) if not isinstance(self.detector, Ours) else self.detector.default
        return {
            "n_outliers": len(images),
            "auroc": by_score[default],
            **({} if masks is None else self._by_pixel(images, masks)),
            "by_score": by_score if isinstance(self.detector, Ours) else {},
        }

    def _by_pixel(self, images: np.ndarray, masks: np.ndarray) -> dict[str, float]:
        """AUROC by pixel of each of its maps, as a record names them."""
        ways = {"pixel_auroc": self.detector.maps}
        if isinstance(self.detector, Ours):
            ways["corruption_pixel_auroc"] = self.detector.corruption_maps
        found = {}
        for name, mapped in ways.items():
            maps = mapped(images)
            if maps is not None:
                found[name] = pixel_auroc(self._held_out_maps(name, mapped), maps, masks)
        return found

    def _scores(self, x: np.ndarray) -> dict[str, np.ndarray]:
        if isinstance(self.detector, Ours):
            return self.detector.scores(x)
        return {self.detector.name: self.detector.score(x)}

    @property
    def held_out(self) -> dict[str, np.ndarray]:
        """Scores of the held-out inliers by name."""
        if self._held_out is None:
            self._held_out = self._scores(self.inliers.held_out)
        return self._held_out

    def _held_out_maps(self, name: str, mapped: Callable[[np.ndarray], Maps | None]) -> Maps:
        """Maps of the held-out inliers, kept by name."""
        if name not in self._maps:
            found = mapped(self.inliers.held_out)
            assert found is not None
            self._maps[name] = found
        return self._maps[name]


def measure(
    tasks: list[Task], makers: dict[str, Callable[[], Detector]], seed: int, limit: int | None, known: Results
) -> Iterator[Record]:
    """Records of every detector on every task that ``known`` lacks, inliers by inliers."""
    for _, group in groupby(tasks, key=lambda task: task.inliers.name):
        of_inliers = list(group)
        for name, make in makers.items():
            open_tasks = [task for task in of_inliers if Key(task.name, name, seed, limit) not in known]
            if name != Ours.name:
                open_tasks = [task for task in open_tasks if task.outliers is not None]
            if open_tasks:
                fitted = Fitted(make(), of_inliers[0].inliers, seed)
                for task in open_tasks:
                    yield fitted.record(task, limit)


def makers_of(names: list[str], ours: Callable[[], Detector]) -> dict[str, Callable[[], Detector]]:
    """What makes each detector, by the name in its records; of a peer that is not installed, a line on stderr."""
    makers: dict[str, Callable[[], Detector]] = {}
    for name in names:
        make = ours if name == OURS else RIVALS[name]
        try:
            makers[Ours.name if name == OURS else RIVALS[name].name] = make
            if name != OURS:
                make()
        except NotInstalled as error:
            del makers[RIVALS[name].name]
            print(f"{RIVALS[name].name}: {error}", file=sys.stderr)
    return makers


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.anomaly", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tasks", nargs="+", default=list(GROUPS), help=f"{', '.join(GROUPS)}, or names (with * and ?)"
    )
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=list(DETECTORS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--limit", type=int, help="at most so many images of every set")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("VAETRAIN_DATA_DIR"))
    parser.add_argument("--exported", type=Path, default=Path("exported"), help="where the shipped bundles lie")
    parser.add_argument("--to", type=Path, default=Path("runs/anomaly"), metavar="DIR", help="results, report, runs")
    parser.add_argument("--merge", type=Path, nargs="*", default=[], metavar="FILE", help="take up other results.json")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for the trainings")
    parser.add_argument("--again", action="store_true", help="measure anew what is known, by bundles exported anew")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure what is asked for and not known yet, and report all that is."""
    options = parse(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module="pyod")
    results = Results(options.to / "results.json")
    for path in options.merge:
        results.take(read_records(path))
    try:
        run(options, results)
    except (ValueError, BundleMissing, TrainingError, VaeserveError) as error:
        raise SystemExit(f"bench.anomaly: {error}") from error
    finally:
        write_report(options.to, [record for record in results if record.limit == options.limit])


def run(options: argparse.Namespace, results: Results) -> None:
    """Measure, record by record."""

    def ours() -> Ours:
        return Ours(options.exported, options.to / "runs", options.set, restage=options.again)

    makers = makers_of(options.detectors, ours)
    known = Results() if options.again else results
    sources = load_sources(options.data_dir)
    for seed in options.seeds:
        tasks = Suite(sources, seed, options.limit).select(options.tasks)
        for record in measure(tasks, makers, seed, options.limit, known):
            results.take([record])
            shown = "" if record.auroc is None else f"AUROC {record.auroc:.4f}"
            print(f"{record.task}, {record.detector}, seed {seed}: {shown}", file=sys.stderr, flush=True)


def write_report(folder: Path, records: list[Record]) -> None:
    """Print the tables, write them and the figure."""
    if not records:
        return
    text = markdown(records)
    write_text(folder / "report.md", text)
    (folder / "auroc.png").write_bytes(png(dots(records)))
    print(text)

"""A run's folder: what ``vaetrain fit`` leaves there, and how every later stage finds it again.

runs/NAME/config.json      the whole configuration
          fit.json         what was asked for, on which machine, how long it took
          checkpoint.pt    weights and optimiser; content["best"] are the averaged weights
          history.csv      one row a validation
          backbone/        the frozen backbone, if there is one, and the images' features (training.data.features)
          metrics.json     evaluate
          bundle/          export and calibrate: NAME/1, a bundle that is not published yet
          scores.npz       calibrate: scores of the calibration split, sorted, and whose; of the test split
          report/          report
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from service.bundle.input_rules import Backbone, InputRule
from training.config import Config, chosen_keys
from training.data import Dataset, load_dataset
from training.data.backbone import Imported
from training.data.features import FOLDER as BACKBONE
from training.data.features import feature_dataset, stored_backbone
from training.data.load import ARRAY_SUFFIXES
from training.data.source import slug
from training.errors import CheckpointError, ConfigError, DataError
from training.fitting.checkpoint import FILE as CHECKPOINT
from training.fitting.checkpoint import digest_of, load_checkpoint
from training.fitting.corruption import FILE as CORRUPTION
from training.fitting.corruption import describe_corruption, fitted_corruption
from training.models.base import LatentVariableModel
from training.models.registry import build_model
from training.nn.unet import UNet
from training.progress import Track, untracked

CONFIG, FIT, METRICS, HISTORY, SCORES = "config.json", "fit.json", "metrics.json", "history.csv", "scores.npz"
LEFTOVERS = (CHECKPOINT, CORRUPTION, CONFIG, FIT, METRICS, HISTORY, SCORES, "bundle", "report", "tensorboard", BACKBONE)


class Launch(BaseModel):
    """What the user asked of ``vaetrain fit``; enough to ask for it again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str | None = None
    backbone: str | None = None
    backbone_output: str | None = None
    backbone_normalise: str | None = None
    preset: str | None = None
    name: str | None = None
    overrides: list[str] = []

    @property
    def chosen_keys(self) -> frozenset[str]:
        """Dotted keys of the configuration that the user set, not a shipped preset. Raises ConfigError."""
        return chosen_keys(self.preset, self.overrides)


class FitRecord(BaseModel):
    """fit.json: facts of a finished training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    launch: Launch
    fingerprint: str
    finished: str
    commit: str | None
    machine: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class Run:
    """A run's folder and configuration; data, weights and records are read when first asked for.

    ``track`` shows how far the reading of the data, and of a backbone's features, has come.
    """

    folder: Path
    config: Config
    track: Track = field(default=untracked, compare=False, repr=False)

    @classmethod
    def open(cls, folder: Path | str, track: Track = untracked) -> Run:
        """The run in that folder. Raises ConfigError if there is none."""
        path = Path(folder) / CONFIG
        if not path.is_file():
            raise ConfigError(f"{folder} is no run: it holds no {CONFIG}; `vaetrain fit` makes one (in runs/NAME)")
        try:
            return cls(Path(folder), Config.model_validate_json(path.read_text()), track)
        except ValidationError as error:
            raise ConfigError(f"{path} is not a configuration of this version: {error}") from error

    def configured(self, config: Config) -> Run:
        """The run with another configuration of the same data, which are not read again."""
        other = Run(self.folder, config, self.track)
        vars(other).update({name: vars(self)[name] for name in ("images", "dataset") if name in vars(self)})
        return other

    @property
    def name(self) -> str:
        """Name of the bundle: the configured one, else the data's."""
        return self.config.name or default_name(self.config.data.source)

    @property
    def staged(self) -> Path:
        """Folder of the bundle that is not published yet."""
        return self.folder / "bundle" / self.name / "1"

    @cached_property
    def dataset(self) -> Dataset:
        """What the model is of: the data of the run, or a backbone's features of them.

        Raises DataError if they are not those that it was trained on, BackboneError.
        """
        dataset = self.images
        if self.backbone is not None:
            dataset = feature_dataset(self.images, self.backbone, self.folder, self.track)
        if self.has_record and dataset.fingerprint != self.record.fingerprint:
            raise DataError(
                f"{self.config.data.source} has changed since the run was trained (fingerprint "
                f"{dataset.fingerprint[:12]}, trained on {self.record.fingerprint[:12]}): train again"
            )
        return dataset

    @cached_property
    def images(self) -> Dataset:
        """The rows as they come in: a backbone's images, or ``dataset``. Raises DataError."""
        return load_dataset(self.config.data, self.track)

    @cached_property
    def backbone(self) -> Imported | None:
        """The frozen backbone before the model, if there is one. Raises BackboneError."""
        config = self.config.backbone
        return None if config is None else stored_backbone(self.folder, config, self.input_rule)

    @property
    def input_rule(self) -> InputRule:
        """How a row from outside becomes pixels, or numbers."""
        rule = self.images.preprocessing
        assert not isinstance(rule, Backbone)
        return rule

    @cached_property
    def checkpoint(self) -> dict[str, Any]:
        """Content of the checkpoint. Raises CheckpointError."""
        content = load_checkpoint(self.folder, self.config)
        if content is None:
            raise CheckpointError(f"{self.folder} holds no {CHECKPOINT}: run `vaetrain fit` first")
        return content

    @cached_property
    def model(self) -> LatentVariableModel:
        """The averaged weights with the best validation bound, in eval mode on the CPU."""
        model = build_model(self.dataset.preprocessing, self.config.model)
        model.load_state_dict(self.checkpoint["best"])
        return model.eval()

    @cached_property
    def corruption(self) -> UNet | None:
        """The network of the score ``corruption`` in eval mode, if the run has one. Raises CheckpointError."""
        if self.config.corruption is None:
            return None
        return fitted_corruption(self.folder, self.config, self.dataset)

    @cached_property
    def corruption_facts(self) -> dict[str, Any] | None:
        """How that network came about, if the run has one. Raises CheckpointError."""
        if self.config.corruption is None:
            return None
        return describe_corruption(self.folder, self.config, self.dataset)

    @cached_property
    def weights_digest(self) -> str:
        """SHA-256, hex, of the weights: ties metrics and bundle to what they were computed from."""
        return digest_of(self.checkpoint["best"])

    @property
    def has_record(self) -> bool:
        """Whether the training came to its end."""
        return (self.folder / FIT).is_file()

    @cached_property
    def record(self) -> FitRecord:
        """Facts of the training. Raises CheckpointError if it has not come to its end."""
        if not self.has_record:
            raise CheckpointError(f"{self.folder} holds no finished training: go on with `vaetrain fit`")
        return FitRecord.model_validate_json((self.folder / FIT).read_text())

    @property
    def is_evaluated(self) -> bool:
        """Whether metrics.json is of these weights, and measured as the configuration asks."""
        path, options = self.folder / METRICS, self.config.evaluate
        found = json.loads(path.read_text()) if path.is_file() else {}
        wanted = {"weights": self.weights_digest} | options.model_dump(include={"k", "images", "gaps", "precision"})
        return wanted.items() <= found.items()

    def metrics(self) -> dict[str, Any] | None:
        """What ``vaetrain evaluate`` found, or None. Raises CheckpointError if that was of other weights."""
        path = self.folder / METRICS
        if not path.is_file():
            return None
        content: dict[str, Any] = json.loads(path.read_text())
        if content["weights"] != self.weights_digest:
            raise CheckpointError(f"{path} is of other weights: run `vaetrain evaluate {self.folder}` again")
        return content

    def save_config(self) -> None:
        """Write config.json."""
        write_text(self.folder / CONFIG, self.config.model_dump_json(indent=2) + "\n")

    def discard(self) -> None:
        """Remove what fit and the later stages wrote; other files in the folder stay."""
        for name in LEFTOVERS:
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def default_name(source: str) -> str:
    """A bundle's name for a data source: of a path its last part, of an array file without the suffix."""
    path = Path(source).expanduser().resolve()
    return slug(path.stem if path.suffix.lower() in ARRAY_SUFFIXES else path.name)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)

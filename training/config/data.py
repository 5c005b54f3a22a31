"""What to train on: the typed configuration of a data set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from service.bundle.input_rules import Preprocessing, Tiling

Side = Annotated[int, Field(ge=1, le=4096)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Column = Annotated[str, Field(coerce_numbers_to_str=True)]


def default_directory() -> Path:
    """The user's cache folder, where downloaded data sets lie unless a directory is given."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vaetrain"


class DataConfig(BaseModel):
    """Which images, vectors or signals, brought to which form, split how.

    ``source`` is ``digits`` (scikit-learn's 8×8 digits, no network), ``mnist``, ``fashion-mnist``, or the path of a
    folder of images, a .npy, .npz, .csv or .parquet file; a folder that is itself called ``mnist`` is written
    ``./mnist``.

    ``kind`` auto takes tables (.csv, .parquet) and arrays of N×D floats for vectors, everything else for images.
    Signals are N×C×T or N×T numbers. Columns of a table are named as its header has them, or by their number from 0.

    Without ``size`` an image set keeps its own size; a folder of images keeps the size that they all share if no side
    of it is over 128 pixels, and becomes 64×64 otherwise. ``mode`` auto is L where the images are grey, else RGB.

    With ``tile`` a folder's images stay as large as they are: training sees ``crops`` of that size from each, at places
    that the image's content and ``split_seed`` fix, and the splits are of images, so that no two of them hold crops of
    one image. The bundle scores whole images by tiles that ``overlap``, and their score by ``aggregate``
    (service.bundle.input_rules.Tiling).

    Data sets that come with a test part keep it whole, and copies of its images elsewhere are left out; ``validation``
    and ``calibration`` are fractions of the rest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(default="digits", min_length=1, description="digits, mnist, fashion-mnist, or a path")
    directory: Path = Field(default_factory=default_directory, description="where data sets lie, or are downloaded to")
    kind: Literal["auto", "image", "vector", "signal"] = Field(default="auto", description="what a row is")
    mode: Literal["auto", "L", "RGB"] = Field(default="auto", description="grey or colour")
    size: Side | tuple[Side, Side] | None = Field(default=None, description="side of a square, or (height, width)")
    tile: Side | tuple[Side, Side] | None = Field(
        default=None, description="a folder's images in crops of this side, or (height, width), at their own resolution"
    )
    crops: int = Field(default=64, ge=1, description="tile: crops of each image, fewer of small ones")
    overlap: float = Field(default=0.5, ge=0, lt=1, description="tile: of neighbouring tiles when images are scored")
    aggregate: Literal["maximum", "top"] = Field(default="maximum", description="tile: an image's score of its tiles'")
    top_share: float = Field(default=0.05, gt=0, le=1, description="aggregate top: share of the tiles that counts")
    fit: Literal["cover", "contain", "stretch"] = Field(default="cover", description="how another shape becomes size")
    resample: Literal["bilinear", "bicubic", "lanczos", "box"] = "bilinear"
    background: int = Field(default=0, ge=0, le=255, description="colour behind transparency and beside ``contain``")
    validation: Fraction = Field(default=0.05, description="fraction kept for early stopping")
    calibration: Fraction = Field(default=0.05, description="fraction kept for conformal calibration")
    test: Fraction = Field(default=0.10, description="fraction kept for the final figures, if no test part comes along")
    split_seed: int = Field(default=0, ge=0, lt=2**32)
    on_bad: Literal["skip", "refuse"] = Field(default="skip", description="what to do with rows that cannot be used")
    memory_limit_mb: int = Field(default=2048, ge=0, description="MiB above which data are streamed")
    limit: int | None = Field(default=None, ge=1, description="use at most so many rows, drawn by split_seed")
    images: str | None = Field(default=None, description="key of the images, vectors or signals in an .npz file")
    labels: str | None = Field(default=None, description="key of the labels in an .npz file")
    keep: list[Column] | None = Field(default=None, description="columns of a table that are a row's numbers; all")
    drop: list[Column] = Field(default=[], description="columns of a table that are left out")
    label: Column | None = Field(default=None, description="column of a table that holds the labels")

    @field_validator("keep", "drop", mode="before")
    @classmethod
    def _one_column_is_a_list(cls, value: Any) -> Any:
        """``--set data.drop=id`` is meant so."""
        return [value] if isinstance(value, str | int) else value

    @model_validator(mode="after")
    def _leaves_a_training_split(self) -> DataConfig:
        held_out = self.validation + self.calibration + self.test
        if held_out >= 1:
            raise ValueError(f"validation + calibration + test is {held_out:g}, which leaves nothing to train on")
        return self

    @model_validator(mode="after")
    def _tiles_are_not_resized(self) -> DataConfig:
        if self.tile is not None and self.size is not None:
            raise ValueError("size and tile exclude each other: tiles are cut out of images in their own size")
        return self

    @property
    def shape(self) -> tuple[int, int] | None:
        """(H, W) of a row as asked for, or None."""
        asked = self.size if self.tile is None else self.tile
        return (asked, asked) if isinstance(asked, int) else asked

    def preprocessing(self, mode: Literal["L", "RGB"], height: int, width: int) -> Preprocessing:
        """The rule that the bundle will carry, with the open parts settled."""
        return Preprocessing(
            mode=mode,
            height=height,
            width=width,
            fit=self.fit,
            resample=self.resample,
            background=self.background,
            tiling=None if self.tile is None else self._tiling(height, width),
        )

    def _tiling(self, height: int, width: int) -> Tiling:
        down, across = (max(1, round(side * (1 - self.overlap))) for side in (height, width))
        return Tiling(stride=(down, across), aggregate=self.aggregate, share=self.top_share)

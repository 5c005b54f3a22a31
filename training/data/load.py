"""load_dataset: the one way from a configuration to a Dataset."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from training.config import DataConfig
from training.data.arrays import array_kind, open_array, refuse_options
from training.data.crops import load_crops
from training.data.dataset import Dataset
from training.data.folders import open_folder
from training.data.named import NAMED
from training.data.source import Source, load_source
from training.data.tables import TABLES, open_table
from training.errors import DataFormatError, DataNotFound
from training.progress import Track, untracked

ARRAY_SUFFIXES = {".npy", ".npz", *TABLES}
FORMS = "a folder of images, or an .npy, .npz, .csv or .parquet file"
TABLE_OPTIONS = ("keep", "drop", "label")


def load_dataset(config: DataConfig, track: Track = untracked) -> Dataset:
    """Find (or download), read, check and split the rows that ``config`` names.

    Raises a DataError that says what was expected: nothing there, bytes that are not their format's, rows refused,
    too few of them left.
    """
    source = _open(config, track)
    return (load_source if config.tile is None else load_crops)(source, config, track)


def kind_of(config: DataConfig) -> Literal["image", "vector", "signal"]:
    """What a row of the data is; images where nothing is found. Raises a DataError if a file cannot be read."""
    path = Path(config.source).expanduser()
    if config.source in NAMED or not path.is_file():
        return "image"
    if path.suffix.lower() in TABLES:
        return "signal" if config.kind == "signal" else "vector"
    return array_kind(path, config) if path.suffix.lower() in ARRAY_SUFFIXES else "image"


def _open(config: DataConfig, track: Track) -> Source:
    path = Path(config.source).expanduser()
    named = config.source in NAMED
    suffix = path.suffix.lower() if path.is_file() and not named else ""
    if config.tile is not None and (named or suffix):
        raise DataFormatError(
            f"{config.source}: data.tile = {config.tile}: expected a folder of images to cut tiles from"
        )
    if suffix in TABLES:
        return open_table(path, config, TABLES[suffix])
    refuse_options(config, TABLE_OPTIONS, path, "it chooses among the columns of a .csv or .parquet file")
    if suffix in ARRAY_SUFFIXES:
        return open_array(path, config)
    if config.kind in ("vector", "signal") and (named or path.is_dir()):
        raise DataFormatError(f"{path}: data.kind = {config.kind!r}: these are images")
    if named:
        return NAMED[config.source](config, track)
    if path.is_dir():
        return open_folder(path, config)
    if path.exists():
        raise DataFormatError(f"{path}: {FORMS} was expected")
    near = difflib.get_close_matches(config.source, NAMED, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise DataNotFound(
        f"{config.source}: no such file or folder, and no data set ({', '.join(NAMED)}) has that name{hint}"
    )

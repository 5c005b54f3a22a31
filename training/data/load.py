"""load_dataset: the one way from a configuration to a Dataset."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from training.data.arrays import open_array
from training.data.config import DataConfig
from training.data.dataset import Dataset
from training.data.digits import open_digits
from training.data.folders import open_folder
from training.data.mnist import FASHION_MNIST, MNIST, open_idx_set
from training.data.source import Source, load_source
from training.errors import DataFormatError, DataNotFound

NAMED: dict[str, Callable[[DataConfig], Source]] = {
    "digits": open_digits,
    "mnist": lambda config: open_idx_set(config, MNIST),
    "fashion-mnist": lambda config: open_idx_set(config, FASHION_MNIST),
}
ARRAY_SUFFIXES = {".npy", ".npz"}


def load_dataset(config: DataConfig) -> Dataset:
    """Find (or download), read, check and split the images that ``config`` names.

    Raises a DataError that says what was expected: nothing there, bytes that are not their format's, images refused,
    too few of them left.
    """
    return load_source(_open(config), config)


def _open(config: DataConfig) -> Source:
    if config.source in NAMED:
        return NAMED[config.source](config)
    path = Path(config.source).expanduser()
    if path.is_dir():
        return open_folder(path, config)
    if path.suffix.lower() in ARRAY_SUFFIXES and path.is_file():
        return open_array(path, config)
    if path.exists():
        raise DataFormatError(f"{path}: a folder of images, an .npy or an .npz file was expected")
    near = difflib.get_close_matches(config.source, NAMED, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise DataNotFound(
        f"{config.source}: no such file or folder, and no data set ({', '.join(NAMED)}) has that name{hint}"
    )

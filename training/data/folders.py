"""A folder of images of the user's own: PNG, JPEG or WebP, nested or flat, grey or colour, of any size."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from service.bundle.input_rules import Preprocessing
from service.errors import VaeserveError
from service.formats.folders import printable, walk
from service.formats.images import DECODER_ERRORS, FORMATS, OWN_FILES, decode_image, decode_whole_image
from training.config import DataConfig
from training.data.source import Source, slug
from training.errors import DataError, DataFormatError, DataNotFound

PROBED = 256  # files, spread evenly over the sorted names, that the size and mode rules look at
KEPT_SIDE = 128  # a size that all images share is kept up to this side: above, networks for a desktop CPU are too slow
FALLBACK_SIDE = 64
WORKERS = min(8, os.cpu_count() or 1)
TRANSPOSED = {5, 6, 7, 8}  # EXIF orientations that swap height and width


@dataclass(frozen=True)
class FilePixels:
    """Image files under ``root``, decoded by the same code that serves; in their own size if the rule is of tiles."""

    root: Path
    paths: Sequence[str]
    preprocessing: Preprocessing

    def read(self, index: int) -> np.ndarray:
        """File ``index`` as uint8 [C,H,W], or [C,h,w] in its own size.

        Raises DataError with the reason if it is no usable image.
        """
        return _decode(self.root / self.paths[index], self.preprocessing)

    def name(self, index: int) -> str:
        """The path relative to the folder, with forward slashes, as UTF-8 can hold it."""
        return printable(self.paths[index])


def open_folder(root: Path, config: DataConfig) -> Source:
    """Every file under ``root``, in the order of its path; hidden ones aside, links followed, loops not.

    Size and mode, where the configuration leaves them open, are chosen from up to 256 files spread evenly: the size
    that all of them share if no side is over 128 pixels, else 64×64; L if all of them are grey in every pixel, else
    RGB. The names of at least two subfolders are labels, if no image lies beside them. Raises DataNotFound.
    """
    paths = _files(root)
    if not paths:
        raise DataNotFound(f"{root}: no file in this folder, hidden ones aside; PNG, JPEG or WebP images were expected")
    preprocessing = _preprocessing(root, paths, config)
    labels, label_names = _labels(paths)
    return Source(
        name=slug(root.resolve().name),
        pixels=FilePixels(root, paths, preprocessing),
        count=len(paths),
        preprocessing=preprocessing,
        labels=labels,
        label_names=label_names,
        workers=WORKERS,
    )


def _files(root: Path) -> list[str]:
    """Paths of all files that are not hidden, relative to the folder and with forward slashes, in their order."""
    return sorted(path.relative_to(root).as_posix() for path in walk(root))


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise DataFormatError("not a regular file")
        if path.stat().st_size > OWN_FILES.max_bytes:
            raise DataFormatError(f"{path.stat().st_size} bytes; at most {OWN_FILES.max_bytes} are read")
        data = path.read_bytes()
    except OSError as error:
        raise DataFormatError(f"cannot be read ({error.strerror})") from error
    if not data:
        raise DataFormatError("empty file")
    return data


def _decode(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    try:
        if preprocessing.tiling is not None:
            return decode_whole_image(_read(path), preprocessing, OWN_FILES)
        return decode_image(_read(path), preprocessing, OWN_FILES)
    except VaeserveError as error:
        raise DataFormatError(str(error)) from error


def cut_off(config: DataConfig) -> tuple[float, float] | None:
    """Share of an image's pixels that ``cover`` cuts off at two edges: the median and the largest over up to PROBED of
    the folder's images, spread evenly. None where nothing is cut: other data, another rule, images of that shape."""
    root = Path(config.source).expanduser()
    if config.fit != "cover" or config.tile is not None or not root.is_dir():
        return None
    paths = _files(root)
    sample = _sample(root, paths)
    height, width = config.shape or _common_size(sample)
    shapes = [(h * width, w * height) for h, w in filter(None, map(_size, sample))]
    shares = [1 - min(shape) / max(shape) for shape in shapes]
    return (float(np.median(shares)), max(shares)) if any(shares) else None


def _sample(root: Path, paths: Sequence[str]) -> list[Path]:
    count = min(len(paths), PROBED)
    return [root / paths[i * len(paths) // count] for i in range(count)]


def _preprocessing(root: Path, paths: Sequence[str], config: DataConfig) -> Preprocessing:
    """The rule that the configuration asks for, its open parts chosen from a sample of the files."""
    sample = _sample(root, paths)
    height, width = config.shape or _common_size(sample)
    if config.mode != "auto":
        return config.preprocessing(config.mode, height, width)
    colour = config.preprocessing("RGB", height, width)
    return config.preprocessing("L", height, width) if all(_is_grey(path, colour) for path in sample) else colour


def _common_size(sample: Sequence[Path]) -> tuple[int, int]:
    """(H, W) that all readable files of the sample share, if it is small enough to be kept; else 64×64."""
    sizes = {size for size in map(_size, sample) if size is not None}
    if len(sizes) == 1 and max(next(iter(sizes))) <= KEPT_SIDE:
        return sizes.pop()
    return FALLBACK_SIDE, FALLBACK_SIDE


def _size(path: Path) -> tuple[int, int] | None:
    """(H, W) of an upright image as its header says, None if it has none."""
    try:
        data = _read(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # size limits are decode_image's, which speaks of them by name
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                turned = image.getexif().get(ExifTags.Base.Orientation) in TRANSPOSED
    except (DataError, Image.DecompressionBombError, *DECODER_ERRORS):
        return None
    return (width, height) if turned else (height, width)


def _is_grey(path: Path, colour: Preprocessing) -> bool:
    """Whether red, green and blue agree in every pixel; True for what is no image, which says nothing of colour."""
    try:
        pixels = _decode(path, colour)
    except DataError:
        return True
    return bool((pixels[0] == pixels[1]).all() and (pixels[0] == pixels[2]).all())


def _labels(paths: Sequence[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """Numbers (-1: in no subfolder) and sorted names of the uppermost subfolders; None if there are fewer than two."""
    tops = [printable(path.partition("/")[0]) if "/" in path else None for path in paths]
    names = sorted({top for top in tops if top is not None})
    if len(names) < 2:
        return None, None
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    return np.array([numbers.get(top, -1) for top in tops], dtype=np.int64), names

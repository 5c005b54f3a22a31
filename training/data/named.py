"""Data sets with a name: scikit-learn's digits, MNIST and Fashion-MNIST.

MNIST and Fashion-MNIST are the official archives, from the data directory or from a public mirror. They are IDX files:
two zero bytes, a type, a number of dimensions, big-endian sizes, then the elements (Y. LeCun, C. Cortes, C. Burges,
"The MNIST database of handwritten digits", section "File formats").
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from training.config import DataConfig
from training.data.arrays import ArrayPixels, native_preprocessing
from training.data.download import Archive, fetch_all, sha256_file
from training.data.source import Source
from training.errors import DataFormatError, DataNotFound
from training.progress import Track, untracked

MAX_BYTES = 2**32  # of elements; MNIST has 47 million, and a hostile header could ask for any number
UNSIGNED_BYTE = 0x08
CHUNK = 2**20
GZIP_MAGIC = b"\x1f\x8b"
LEVELS = 16  # pixel values are counts 0 … 16


def open_digits(config: DataConfig, track: Track = untracked) -> Source:
    """The digits as grey 8-bit images: count c of 0 … 16 becomes ⌊255·c/16 + ½⌋.

    Source: E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI repository, 1998 (its test part).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.floor(bunch.images * (255 / LEVELS) + 0.5).astype(np.uint8)[:, None]
    preprocessing = native_preprocessing(images.shape[1:], config)
    return Source(
        name="digits",
        pixels=ArrayPixels(images, preprocessing, "digits"),
        count=len(images),
        preprocessing=preprocessing,
        labels=bunch.target.astype(np.int64),
        label_names=[str(name) for name in bunch.target_names],
    )


@dataclass(frozen=True)
class IdxSet:
    """A data set in MNIST's format: where its archives are found, in the order train and test, images and labels."""

    name: str
    mirrors: Sequence[str]
    archives: Sequence[Archive]
    label_names: Sequence[str]


# Sizes and SHA-256 of the archives as their authors published them (MD5 as in torchvision's lists).
MNIST = IdxSet(
    name="mnist",
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        "https://storage.googleapis.com/cvdf-datasets/mnist",
        "https://raw.githubusercontent.com/fgnt/mnist/master",
    ),
    archives=(
        Archive(
            "train-images-idx3-ubyte.gz", 9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
        ),
        Archive(
            "train-labels-idx1-ubyte.gz", 28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
        ),
        Archive(
            "t10k-images-idx3-ubyte.gz", 1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
        ),
        Archive("t10k-labels-idx1-ubyte.gz", 4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    ),
    label_names=tuple("0123456789"),
)

FASHION_MNIST = IdxSet(
    name="fashion-mnist",
    mirrors=(
        "https://fashion-mnist.s3.eu-central-1.amazonaws.com",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    ),
    archives=(
        Archive(
            "train-images-idx3-ubyte.gz", 26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
        ),
        Archive(
            "train-labels-idx1-ubyte.gz", 29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
        ),
        Archive(
            "t10k-images-idx3-ubyte.gz", 4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
        ),
        Archive(
            "t10k-labels-idx1-ubyte.gz", 5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
        ),
    ),
    label_names=(
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
)  # fmt: skip


def open_idx_set(idx_set: IdxSet, config: DataConfig, track: Track = untracked) -> Source:
    """The official train and test parts, in that order, from DIRECTORY/NAME (gzipped or not), downloaded if need be.

    The user's own files are taken as they are, labels or none. Raises DownloadError, DataNotFound, DataFormatError.
    """
    folder = config.directory.expanduser() / idx_set.name
    files = _files(folder, idx_set, track)
    train, test = (_part(files, images, labels) for images, labels in ((0, 1), (2, 3)))
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DataFormatError(f"{folder}: train images are {train[0].shape[1:]}, test images {test[0].shape[1:]}")
    images = np.concatenate([train[0], test[0]])[:, None]
    labels = None if train[1] is None or test[1] is None else np.concatenate([train[1], test[1]]).astype(np.int64)
    preprocessing = native_preprocessing(images.shape[1:], config)
    return Source(
        name=idx_set.name,
        pixels=ArrayPixels(images, preprocessing, idx_set.name),
        count=len(images),
        preprocessing=preprocessing,
        labels=labels,
        label_names=_label_names(labels, idx_set),
        is_test=np.arange(len(images)) >= len(train[0]),
        details={"files": {path.name: sha256_file(path) for path in files if path is not None}},
    )


def _files(folder: Path, idx_set: IdxSet, track: Track) -> list[Path | None]:
    """The four files, or None for labels that the user's own set lacks; downloads what is missing.

    Only official archives are completed by official archives: beside another edition (another order of the images,
    say) a downloaded label file would be silently wrong.
    """
    found = [_find(folder, archive.name) for archive in idx_set.archives]
    if found[0] and found[2]:
        return found
    for path, archive in zip(found, idx_set.archives, strict=True):
        if path is not None and sha256_file(path) != archive.sha256:
            raise DataNotFound(
                f"{folder} lacks image files, and {path.name} there is not the official one, so the rest is not "
                f"downloaded beside it: put all of {', '.join(a.name for a in idx_set.archives)} there, or none"
            )
    fetch_all(idx_set.archives, idx_set.mirrors, folder, track)
    return [_find(folder, archive.name) for archive in idx_set.archives]


def _find(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / name.removesuffix(".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _part(files: Sequence[Path | None], images_at: int, labels_at: int) -> tuple[np.ndarray, np.ndarray | None]:
    images_path, labels_path = files[images_at], files[labels_at]
    assert images_path is not None
    images = read_idx(images_path, ndim=3)
    if 0 in images.shape:
        raise DataFormatError(f"{images_path}: holds no pixels, its sizes are {images.shape}")
    if labels_path is None:
        return images, None
    labels = read_idx(labels_path, ndim=1)
    if len(labels) != len(images):
        raise DataFormatError(f"{labels_path}: {len(labels)} labels for {len(images)} images")
    return images, labels


def _label_names(labels: np.ndarray | None, idx_set: IdxSet) -> list[str] | None:
    """The official names, unless the labels are of another set in the same format."""
    if labels is None or int(labels.max()) >= len(idx_set.label_names):
        return None
    return list(idx_set.label_names)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """The uint8 array of ``ndim`` dimensions in an IDX file, gzipped or not.

    Raises DataNotFound, or DataFormatError naming the file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataNotFound(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return parse_idx(data, ndim)
    except DataFormatError as error:
        raise DataFormatError(f"{path}: {error}") from error


def parse_idx(data: bytes, ndim: int) -> np.ndarray:
    """The uint8 array of ``ndim`` dimensions that IDX bytes hold, gzipped or not.

    Raises DataFormatError unless magic, dimensions and length are exactly right.
    """
    try:
        if data.startswith(GZIP_MAGIC):
            with gzip.GzipFile(fileobj=BytesIO(data)) as stream:
                return _parse(stream, ndim)
        return _parse(BytesIO(data), ndim)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataFormatError(f"damaged gzip data ({error})") from error


def _parse(stream: BinaryIO | gzip.GzipFile, ndim: int) -> np.ndarray:
    shape = _header(stream, ndim)
    elements = math.prod(shape)
    if elements > MAX_BYTES:
        raise DataFormatError(f"the header says {shape}, {elements} bytes; at most {MAX_BYTES} are read")
    body = bytearray()
    while len(body) <= elements:
        chunk = stream.read(min(CHUNK, elements + 1 - len(body)))
        if not chunk:
            break
        body += chunk
    if len(body) != elements:
        found = f"only {len(body)}" if len(body) < elements else "more"
        raise DataFormatError(f"the header says {shape}, {elements} bytes, but {found} follow")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def _header(stream: BinaryIO | gzip.GzipFile, ndim: int) -> tuple[int, ...]:
    magic = stream.read(4)
    expected = bytes([0, 0, UNSIGNED_BYTE, ndim])
    if magic != expected:
        raise DataFormatError(
            f"begins with {magic.hex(' ') or 'nothing'}; an IDX file of unsigned bytes in {ndim} dimensions begins "
            f"with {expected.hex(' ')}"
        )
    sizes = stream.read(4 * ndim)
    if len(sizes) != 4 * ndim:
        raise DataFormatError(f"ends within the header; {ndim} sizes of 4 bytes were expected")
    return struct.unpack(f">{ndim}I", sizes)


NAMED: dict[str, Callable[[DataConfig, Track], Source]] = {
    "digits": open_digits,
    "mnist": partial(open_idx_set, MNIST),
    "fashion-mnist": partial(open_idx_set, FASHION_MNIST),
}
"""From a data set's name to what opens it."""

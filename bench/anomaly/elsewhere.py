"""Image sets that no score, weight or preset was tuned on: tasks of the group ``elsewhere``.

    digits-even/odd, digits-odd/even    handwriting at 8×8, of scikit-learn's copy of the UCI set (Alpaydin & Kaynak)
    photograph/…                        colour crops of one photograph against those of another, and transformed ones
    plaster, brushed, woven/…           synthetic surfaces (bench.anomaly.surfaces) against such with a flaw

Held-out inliers are images, or parts of the photograph, that no detector was fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.datasets import load_digits, load_sample_images

from bench.anomaly.surfaces import FLAWS, SURFACES, flawed, surfaces
from bench.anomaly.task import Inliers, Outliers, Task
from bench.anomaly.transforms import TRANSFORMS, as_levels

GROUP = "elsewhere"
TEST = 0.3  # of the digits
CROP, STEP, BLOCK = 16, 4, 64  # pixels of the photographs
SIDE, GOOD, HELD_OUT, FLAWED = 32, 2000, 500, 250  # of the surfaces
ALTERED = ("rotated", "blurred", "noisy")

Limit = Callable[[np.ndarray], np.ndarray]
StreamOf = Callable[[str], np.random.RandomState]


def elsewhere(stream: StreamOf, limited: Limit) -> Iterator[Task]:
    """All its tasks; ``stream`` gives the seed's random numbers for a name, ``limited`` the first images of a set."""
    yield from _digits(stream, limited)
    yield from _photographs(stream, limited)
    for kind in SURFACES:
        yield from _surfaces(kind, stream, limited)


def _digits(stream: StreamOf, limited: Limit) -> Iterator[Task]:
    images, labels = load_digits(return_X_y=True)
    images = as_levels(images.reshape(-1, 1, 8, 8) * 255 / 16)
    order = stream("digits").permutation(len(images))
    test, train = np.split(order, [round(TEST * len(order))])
    for name, parity in (("even", 0), ("odd", 1)):
        own, held_out = (limited(images[part[labels[part] % 2 == parity]]) for part in (train, test))
        others = limited(images[test[labels[test] % 2 != parity]])
        inliers = Inliers(f"digits-{name}", "digits", tuple(range(parity, 10, 2)), own, held_out)
        yield _task(f"digits-{name}/{'odd' if name == 'even' else 'even'}", inliers, others)


def _photographs(stream: StreamOf, limited: Limit) -> Iterator[Task]:
    """Crops of the photograph of a temple: blocks of a checkerboard train, the others are held out."""
    temple, flower = load_sample_images().images
    known, new = _blocks(temple)
    shuffled = stream("photograph").permutation
    train = _crops(known, STEP)
    held_out, other = _crops(new, CROP), _crops([flower], CROP)
    order = shuffled(len(held_out))
    inliers = Inliers("photograph", "photograph", (0,), limited(train[shuffled(len(train))]), limited(held_out[order]))
    yield _task("photograph/flower", inliers, limited(other[shuffled(len(other))]))
    for name in ALTERED:
        yield _task(f"photograph/{name}", inliers, TRANSFORMS[name](limited(held_out[order[::-1]]), stream(name)))


def _surfaces(kind: str, stream: StreamOf, limited: Limit) -> Iterator[Task]:
    random = stream(kind)
    good, held_out = (limited(_grey(surfaces(kind, n, SIDE, random))) for n in (GOOD, HELD_OUT))
    inliers = Inliers(kind, "surfaces", (0,), good, held_out)
    for flaw in FLAWS:
        images, masks = flawed(surfaces(kind, FLAWED, SIDE, random), flaw, random)
        yield _task(f"{kind}/{flaw}", inliers, limited(_grey(images)), limited(masks))


def _task(name: str, inliers: Inliers, images: np.ndarray, masks: np.ndarray | None = None) -> Task:
    return Task(name, GROUP, inliers, lambda: Outliers(images, masks))


def _blocks(image: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The black and the white fields of a checkerboard over [H,W,3]; what is left at the edges belongs to none."""
    height, width = image.shape[:2]
    fields: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for y in range(0, height - BLOCK + 1, BLOCK):
        for x in range(0, width - BLOCK + 1, BLOCK):
            fields[(x + y) // BLOCK % 2].append(image[y : y + BLOCK, x : x + BLOCK])
    return fields


def _crops(images: list[np.ndarray], step: int) -> np.ndarray:
    """Squares of CROP pixels, ``step`` apart, of images [H,W,3]: uint8 [N,3,CROP,CROP]."""
    windows = [sliding_window_view(image, (CROP, CROP), axis=(0, 1))[::step, ::step] for image in images]
    return np.concatenate([np.ascontiguousarray(each).reshape(-1, 3, CROP, CROP) for each in windows])


def _grey(x: np.ndarray) -> np.ndarray:
    return as_levels(255 * x)[:, None]

"""Peers and floors on the same data: each is fitted on the inliers' training images alone, and scores are float64 [N],
higher is more anomalous. Pixels are float32 in [0, 1], flattened.

Settings are the peers' documented ones, with what had to differ said beside them. No setting was chosen by looking at
outliers.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import OneClassSVM

from bench.anomaly.task import Inliers
from service.bundle.input_rules import Preprocessing
from service.inference.noise import dither
from training.config import LikelihoodConfig, ModelConfig
from training.data.batches import SplitRows, to_unit
from training.data.dataset import Dataset
from training.models.factor import PPCA

BATCH = 500
Maps = np.ndarray


class NotInstalled(RuntimeError):
    """The detector's package is not there; the text says how to get it."""


class Detector(ABC):
    """A detector fitted on inliers. ``settings`` tells a reader what was run."""

    name: str
    settings: str

    @abstractmethod
    def fit(self, inliers: Inliers, seed: int) -> None:
        """Fit on ``inliers.train``, uint8 [N,C,H,W]."""

    @abstractmethod
    def score(self, x: np.ndarray) -> np.ndarray:
        """x uint8 [N,C,H,W] -> float64 [N]."""

    def maps(self, x: np.ndarray) -> Maps | None:
        """x uint8 [N,C,H,W] -> float [N,H,W], higher is more anomalous; None if the detector has no such thing."""
        return None


class LinearFloor(Detector):
    """Minus log p(x) of probabilistic PCA, exact; the map is the squared residual (Tipping & Bishop 1999)."""

    name = "PPCA"
    latent_dim = 64
    settings = f"exact log p(x), {latent_dim} latent dimensions"

    def fit(self, inliers: Inliers, seed: int) -> None:
        shape = inliers.train.shape[1:]
        dimensions = min(self.latent_dim, int(np.prod(shape)) - 1, len(inliers.train) - 1)
        config = ModelConfig(
            family="ppca", latent_dim=dimensions, likelihood=LikelihoodConfig(family="gaussian", scale="shared")
        )
        self._model = PPCA(shape, config)
        dataset = as_dataset(inliers)
        rows = SplitRows(dataset, dataset.splits["train"])
        for _ in self._model.finish(rows, rows, seed):
            pass
        self._model.eval()

    def score(self, x: np.ndarray) -> np.ndarray:
        return in_batches(x, lambda part: -self._model.log_marginal(self._target(part)).numpy())

    def maps(self, x: np.ndarray) -> Maps:
        return in_batches(x, self._residuals)

    def _target(self, x: np.ndarray) -> torch.Tensor:
        drawn = np.broadcast_to(dither(0, x.shape[1:]), x.shape)
        return self._model.likelihood.target(to_unit(x), torch.from_numpy(drawn.copy()))

    def _residuals(self, x: np.ndarray) -> np.ndarray:
        target = self._target(x)
        mean = self._model.decode(self._model.encode(target).loc).mean
        squared: np.ndarray = ((target - mean[:, 0]) ** 2).sum(1).detach().numpy()
        return squared


class NearestNeighboursOnPixels(Detector):
    """Mean Euclidean distance to the 5 nearest training images; the map is the mean squared difference to them."""

    name = "5-NN"
    settings = "k = 5, all training images, Euclidean distance of pixels"

    def fit(self, inliers: Inliers, seed: int) -> None:
        self._train = flat(inliers.train)
        self._index = NearestNeighbors(n_neighbors=min(5, len(self._train)), algorithm="brute").fit(self._train)

    def score(self, x: np.ndarray) -> np.ndarray:
        return in_batches(x, lambda part: self._index.kneighbors(flat(part))[0].mean(1))

    def maps(self, x: np.ndarray) -> Maps:
        return in_batches(x, self._differences)

    def _differences(self, x: np.ndarray) -> np.ndarray:
        pixels, near = flat(x), self._index.kneighbors(flat(x))[1]
        squared: np.ndarray = ((pixels[:, None] - self._train[near]) ** 2).mean(1).reshape(x.shape).mean(1)
        return squared


class Forest(Detector):
    """scikit-learn's IsolationForest (Liu et al. 2008)."""

    name = "IsolationForest"
    settings = "scikit-learn, 100 trees of 256 images each, as the paper has it"

    def fit(self, inliers: Inliers, seed: int) -> None:
        self._forest = IsolationForest(n_estimators=100, max_samples=min(256, len(inliers.train)), random_state=seed)
        self._forest.fit(flat(inliers.train))

    def score(self, x: np.ndarray) -> np.ndarray:
        return in_batches(x, lambda part: -self._forest.score_samples(flat(part)))


class SupportVectors(Detector):
    """scikit-learn's OneClassSVM (Schölkopf et al. 2001)."""

    name = "OneClassSVM"
    most = 6000
    settings = f"scikit-learn, RBF kernel, γ = 1/(D var x), ν = 0.1, {most} training images at most"

    def fit(self, inliers: Inliers, seed: int) -> None:
        chosen = np.random.RandomState(seed).permutation(len(inliers.train))[: self.most]
        self._machine = OneClassSVM(kernel="rbf", gamma="scale", nu=0.1).fit(flat(inliers.train[chosen]))

    def score(self, x: np.ndarray) -> np.ndarray:
        return in_batches(x, lambda part: -self._machine.score_samples(flat(part)))


class PyodVAE(Detector):
    """PyOD's VAE: its loss and its score, the distance to a reconstruction from a sampled z (seeded here).

    By its defaults pixels are standardised one by one and the KL term is clamped to nothing (``capacity`` 0).
    """

    name = "PyOD VAE"
    most = 20_000
    settings = (
        f"PyOD 3, 784-300-300-32 as ours, batches of 128, {most} training images at most; the rest by default (30 "
        "epochs, pixels standardised)"
    )

    def __init__(self) -> None:
        if importlib.util.find_spec("pyod") is None:
            raise NotInstalled("not installed: pip install -c deploy/constraints.txt -r bench/anomaly/requirements.txt")

    def fit(self, inliers: Inliers, seed: int) -> None:
        from pyod.models.vae import VAE

        self._vae = VAE(
            batch_size=128,
            encoder_neuron_list=[300, 300],
            decoder_neuron_list=[300, 300],
            latent_dim=32,
            device="cpu",
            random_state=seed,
            verbose=0,
        )
        chosen = np.random.RandomState(seed).permutation(len(inliers.train))[: self.most]
        self._vae.fit(flat(inliers.train[chosen]))

    def score(self, x: np.ndarray) -> np.ndarray:
        torch.manual_seed(0)
        return np.asarray(self._vae.decision_function(flat(x)), np.float64)


RIVALS: dict[str, type[Detector]] = {
    "ppca": LinearFloor,
    "knn": NearestNeighboursOnPixels,
    "isolation-forest": Forest,
    "one-class-svm": SupportVectors,
    "pyod-vae": PyodVAE,
}


def flat(x: np.ndarray) -> np.ndarray:
    """uint8 [N,C,H,W] -> float32 [N,C·H·W] in [0, 1]."""
    return x.reshape(len(x), -1).astype(np.float32) / np.float32(255)


def in_batches(x: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """``function`` of every BATCH images of x, one after the other, without gradients."""
    with torch.no_grad():
        return np.concatenate([function(x[i : i + BATCH]) for i in range(0, len(x), BATCH)])


def as_dataset(inliers: Inliers) -> Dataset:
    """The training images as training.data's Dataset, all of them in every split."""
    channels, height, width = inliers.train.shape[1:]
    rule = Preprocessing(mode="L" if channels == 1 else "RGB", height=height, width=width)
    everything = np.arange(len(inliers.train))
    splits = dict.fromkeys(("train", "validation", "calibration", "test"), everything)
    return Dataset(inliers.name, rule, splits, None, None, "0" * 64, [], inliers.train.dtype, inliers.train)

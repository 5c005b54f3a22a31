"""Data sets of given rows, and models solved on them: no files, no loop."""

import numpy as np
import torch

from service.bundle.input_rules import ArrayPreprocessing, Preprocessing
from training.config import ModelConfig
from training.data.batches import SplitRows
from training.data.dataset import Dataset
from training.fitting.trainer import start
from training.models.registry import build_model


def dataset_of(rows, held_out=0.2):
    """Vectors float [N,D], or images uint8 [N,C,H,W], the last ``held_out`` of them for validation and test."""
    if rows.ndim == 2:
        rule = ArrayPreprocessing(kind="vector", natural=(rows.shape[1],))
        store = rows.astype(np.float32)[:, None, None]
    else:
        mode = "L" if rows.shape[1] == 1 else "RGB"
        rule, store = Preprocessing(mode=mode, height=rows.shape[2], width=rows.shape[3]), rows
    train = len(rows) - int(held_out * len(rows))
    held = np.arange(train, len(rows))
    splits = {"train": np.arange(train), "validation": held, "calibration": held, "test": held}
    return Dataset("rows", rule, splits, None, None, "", [], store.dtype, store)


def solved(rows, family, held_out=0.2, **model):
    """The model of that family fitted by ``finish`` to ``rows``, and its data set; ``model`` is the [model] table."""
    dataset = dataset_of(rows, held_out)
    torch.manual_seed(0)
    built = build_model(dataset.preprocessing, ModelConfig.model_validate({"family": family, **model})).eval()
    start(built, dataset)
    finish(built, dataset)
    return built, dataset


def finish(model, dataset):
    """The model's ``finish`` on the training and validation rows, with seed 0; what it yields."""
    train, validation = (SplitRows(dataset, dataset.splits[name]) for name in ("train", "validation"))
    return list(model.finish(train, validation, 0))


def targets(model, dataset, split="train"):
    """Targets [N,C,H,W] of a split's rows at drawn dither, if they are dithered."""
    rows = dataset.pixels(dataset.splits[split])
    x = torch.from_numpy(rows if rows.dtype == np.float32 else (rows / 255).astype(np.float32))
    dither = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    return model.likelihood.target(x, dither)


def log_weights(model, target, noise):
    """log p(x|z) + log p(z) − log q(z|x) at samples [N,K] of each target, float64."""
    z, log_q_z = model.encode(target).rsample(noise)
    log_p_x_given_z, _, log_p_z = model.joint(target, z, model.decode_samples(z))
    return log_p_x_given_z + log_p_z - log_q_z


def digits():
    """scikit-learn's 1797 digits as 8-bit images [N,1,8,8]."""
    from sklearn.datasets import load_digits

    return np.round(load_digits().images * (255 / 16)).astype(np.uint8)[:, None]


def factor_rows(count=600, numbers=7, factors=2, seed=0):
    """Vectors of two factors and unequal noise, in unequal units: float64 [count, numbers]."""
    random = np.random.RandomState(seed)
    loadings = random.standard_normal((numbers, factors)) * 2
    noise = random.standard_normal((count, numbers)) * np.linspace(0.5, 1.5, numbers)
    return (random.standard_normal((count, factors)) @ loadings.T + noise) * np.geomspace(0.1, 100, numbers) + 5

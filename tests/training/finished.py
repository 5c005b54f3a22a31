"""Finished runs without a training: real folders with data, configuration and checkpoint, weights drawn at random."""

from dataclasses import asdict

import numpy as np
import torch

from training.config import load_config
from training.export.provenance import machine, versions
from training.fitting.checkpoint import save_checkpoint
from training.fitting.metrics import SAMPLED
from training.fitting.trainer import State
from training.models.registry import build_model
from training.runs import FIT, FitRecord, Launch, Run

HISTORY = (*SAMPLED, "bound", "elbo", "rate", "distortion")


def finished_run(folder, shape, model, images=120, dtype=np.uint8, **sections):
    """A run in folder/runs/tiny of a model for ``shape``, data in folder/tiny.npy; ``model`` is the [model] table."""
    source = folder / "tiny.npy"
    pixels = np.random.RandomState(0).randint(0, 256, (images, *shape))
    np.save(source, pixels.astype(np.uint8) if dtype == np.uint8 else (pixels / 255).astype(dtype))
    data = {"source": str(source), "validation": 0.1, "calibration": 0.3, "test": 0.3, "on_bad": "refuse"}
    data |= sections.pop("data", {})
    config = load_config(None, [], {"name": "tiny", "data": data, "model": model, "evaluate": {"k": 8}, **sections})
    run = Run(folder / "runs" / "tiny", config)
    run.folder.mkdir(parents=True)
    run.save_config()
    torch.manual_seed(0)
    built = build_model(run.dataset.preprocessing, config.model)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = State(step=30, best_bound=-10.0, best_epoch=2, seconds=4.5, finished=True)
    history = [{"epoch": e, "step": 10 * e, **dict.fromkeys(HISTORY, -20.0 + e)} for e in (1, 2, 3)]
    save_checkpoint(run.folder, config, {"best": built.state_dict(), "state": asdict(state), "history": history})
    launch = Launch(data=str(source), overrides=["model.latent_dim=3", f"data.directory={folder}"])
    record = FitRecord(
        launch=launch,
        fingerprint=run.dataset.fingerprint,
        finished="2026-01-02T03:04:05+00:00",
        commit=None,
        machine=machine(),
        versions=versions(),
    )
    (run.folder / FIT).write_text(record.model_dump_json())
    return Run.open(run.folder)

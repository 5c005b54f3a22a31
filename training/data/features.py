"""A run's frozen backbone and the features of its images: computed once, as the service computes them, and kept.

RUN/backbone/backbone.onnx   the graph that the bundle will carry
             backbone.json   what it is, and of which file and options it was made
             features.npy    features of every image of the pool, float32 [N, *backbone.shape]
             features.json   of which graph and data they are
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from service.bundle.input_rules import Backbone, InputRule
from service.errors import InvalidInput
from service.inference.backbone import FeatureExtractor
from service.inference.sessions import Runtime
from training.config import BackboneConfig
from training.data.backbone import Imported, import_backbone
from training.data.batches import to_unit
from training.data.dataset import Dataset
from training.errors import BackboneError
from training.progress import Track, untracked

FOLDER = "backbone"
GRAPH, DESCRIBED = "backbone.onnx", "backbone.json"
FEATURES, OF = "features.npy", "features.json"
BATCH = 32


def stored_backbone(folder: Path, config: BackboneConfig, rule: InputRule) -> Imported:
    """The run's backbone: the one that lies in its folder if it is the configured one, else the user's file, imported.

    Raises BackboneError.
    """
    place = folder / FOLDER
    made_of = config.model_dump(mode="json", exclude={"path"}) | {"image": list(rule.shape)}
    try:
        described = json.loads((place / DESCRIBED).read_text())
        graph = (place / GRAPH).read_bytes()
    except (OSError, ValueError):
        described, graph = {}, b""
    if described.get("made_of") == made_of and described.get("graph") == _sha256(graph):
        return Imported(graph, Backbone.model_validate_json(json.dumps(described["backbone"])), rule.shape)
    imported = import_backbone(config, rule)
    place.mkdir(parents=True, exist_ok=True)
    _write(place / GRAPH, imported.graph)
    content = {
        "made_of": made_of,
        "graph": _sha256(imported.graph),
        "backbone": imported.backbone.model_dump(mode="json"),
    }
    _write(place / DESCRIBED, (json.dumps(content, indent=2) + "\n").encode())
    return imported


def feature_dataset(images: Dataset, imported: Imported, folder: Path, track: Track = untracked) -> Dataset:
    """The images' features under the images' splits and labels; computed where the run has none of this graph and data.

    Its fingerprint is of the images and the graph. Raises BackboneError for features that are not finite.
    """
    identity = hashlib.sha256(f"{images.fingerprint} {_sha256(imported.graph)}".encode()).hexdigest()
    place = folder / FOLDER
    shape = (len(images), *imported.backbone.shape)
    if not _is_of(place / OF, identity):
        place.mkdir(parents=True, exist_ok=True)
        part = place / f"{FEATURES}.part"
        _compute(images, imported, np.lib.format.open_memmap(part, "w+", np.float32, shape), track)
        (place / OF).unlink(missing_ok=True)
        part.replace(place / FEATURES)
        _write(place / OF, json.dumps({"identity": identity}).encode())
    features = np.load(place / FEATURES, mmap_mode="r")
    return replace(
        images,
        preprocessing=imported.backbone,
        fingerprint=identity,
        dtype=np.dtype(np.float32),
        store=features,
    )


def _compute(images: Dataset, imported: Imported, features: np.ndarray, track: Track) -> None:
    """Features of every image of the pool, in its order, into an array that may lie in a file."""
    extractor = FeatureExtractor.load(imported.graph, imported.backbone, imported.image, Runtime("cpu"))
    starts = range(0, len(images), BATCH)
    batches = images.batches(np.arange(start, min(start + BATCH, len(images))) for start in starts)
    with track("features", len(images)) as advance:
        for start, pixels in zip(starts, batches, strict=True):
            try:
                features[start : start + len(pixels)] = extractor.run(to_unit(pixels).numpy())
            except InvalidInput as error:
                raise BackboneError(f"images {start} to {start + len(pixels) - 1}: {error}") from error
            advance(len(pixels))
    if isinstance(features, np.memmap):
        features.flush()


def _is_of(path: Path, identity: str) -> bool:
    try:
        return bool(json.loads(path.read_text()).get("identity") == identity)
    except (OSError, ValueError):
        return False


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    os.replace(temporary, path)

"""Features of a frozen backbone, which are the rows of a latent variable model; for training and serving alike."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from service.bundle.input_rules import Backbone
from service.bundle.operators import check_operators
from service.errors import InvalidInput
from service.inference.batch_invariance import TWO_PATHS, Arrays, BatchInvariantRunner, random_rows
from service.inference.row_sums import samples_of_aligned_rows
from service.inference.row_threads import RowThreads
from service.inference.sessions import Runtime

SIZES = (1, 8)
"""Batch sizes to try: one row of a backbone keeps a processor busy, and each size costs trials at the start."""

Shape = tuple[int, int, int]


class FeatureExtractor:
    """Runs backbone.onnx on images of shape ``image`` (C, H, W); rows are independent, bitwise
    (service.inference.batch_invariance).

    ``aligned``: whether rows may run together (service.inference.row_sums). ``vectors``, ``threads``, ``memory``: see
    BatchInvariantRunner.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        backbone: Backbone,
        image: Shape,
        aligned: bool = True,
        vectors: bool = False,
        threads: RowThreads | None = None,
        memory: str | None = None,
    ) -> None:
        self.backbone, self.image = backbone, image
        sizes = SIZES if backbone.batch == "any" and aligned else (1,)
        trial_rows = random_rows({"x": image}, frozenset({"x"}))
        self._rows = BatchInvariantRunner(session, trial_rows, sizes, vectors, threads, memory)
        self._session = session

    @classmethod
    def load(cls, graph: bytes, backbone: Backbone, image: Shape, runtime: Runtime) -> FeatureExtractor:
        """Load a serialised backbone.onnx that no bundle holds yet. Raises BundleGraphError, DeviceUnavailable."""
        operators = check_operators(graph)
        serial = bool(TWO_PATHS & operators.keys())
        session = runtime.session(graph, threads=1 if serial else None)
        aligned = bool(samples_of_aligned_rows(graph, operators, runtime))
        return cls(session, backbone, image, aligned, serial, runtime.row_threads, runtime.memory)

    def run(self, x: np.ndarray) -> np.ndarray:
        """Features, float32 [N,*backbone.shape], of images x, float32 [N,*image] in [0, 1].

        Raises InvalidInput for a row whose features are not finite.
        """
        features = self._rows.run({"x": x})["features"].reshape(len(x), *self.backbone.shape)
        finite = np.isfinite(features).all(axis=(1, 2, 3))
        if not finite.all():
            raise InvalidInput(f"row {int(np.argmin(finite))}: the backbone's features of it are not finite numbers")
        return features

    def run_at_once(self, feeds: Arrays) -> Arrays:
        """Outputs for all rows of ``feeds`` in a single run, or in one run a row where the graph takes no more."""
        x = feeds["x"]
        parts = [x] if self.backbone.batch == "any" else [x[i : i + 1] for i in range(len(x))]
        return {"features": np.concatenate([self._session.run(["features"], {"x": part})[0] for part in parts])}

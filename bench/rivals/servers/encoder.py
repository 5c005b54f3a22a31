"""The encoder graph through onnxruntime, as every server here has it: one thread a process."""

import os

import numpy as np
import onnxruntime as ort

WORKERS = int(os.environ.get("BENCH_WORKERS", "2"))
PORT = int(os.environ.get("BENCH_PORT", "8000"))


class Encoder:
    """x float32 [N,C,H,W] -> loc and scale, float32 [N,L]."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(os.environ["BENCH_ENCODER"], options, providers=["CPUExecutionProvider"])
        x, noise, *_ = self._session.get_inputs()
        self.shape, self.noise_dim = tuple(x.shape[1:]), noise.shape[2]
        self.latent_dim = self._session.get_outputs()[1].shape[1]

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        noise = np.zeros((len(x), 1, self.noise_dim), np.float32)
        loc, scale = self._session.run(["loc", "scale"], {"x": np.ascontiguousarray(x, np.float32), "noise": noise})
        return loc, scale

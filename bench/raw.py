"""Raw ONNX Runtime: each verb's sequence of graphs on arrays that lie ready, and nothing else. What could be reached.

The sessions have ONNX Runtime's default options (its threads spin, which the service's do not), a batch goes through in
one run whatever its size, no output is checked, and nobody keeps rows bitwise independent of their batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import onnxruntime as ort

from service.bundle import Bundle, Graph

Work = Callable[[], object]


class Layout(NamedTuple):
    """So many threads that call, and so many in the pool of each session."""

    callers: int
    threads: int


def layouts(connections: int) -> list[Layout]:
    """The layouts worth trying: one caller with one thread or all, and for many requests at once a caller a core."""
    cores = len(os.sched_getaffinity(0))
    many = [Layout(min(connections, cores), 1)] if connections > 1 else []
    return list(dict.fromkeys([ALONE, Layout(1, cores), *many]))


ALONE = Layout(1, 1)


class RawModel:
    """The sessions of one bundle with so many threads each, and the verbs on ``x`` float32 [N,C,H,W] in [0, 1]."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        roles: tuple[Graph, ...] = ("encoder", "decoder", "density")
        self._manifest = bundle.manifest
        self._sessions = {
            role: ort.InferenceSession(bundle.graph(role), options, providers=["CPUExecutionProvider"])
            for role in roles
        }

    def verb(self, name: str, x: np.ndarray) -> Work:
        """The verb as a function of nothing, its inputs made beforehand."""
        verbs = {"encode": self._encode, "reconstruct": self._reconstruct, "score": self._score, "sample": self._sample}
        return verbs[name](x)

    def _inputs(self, x: np.ndarray, k: int) -> dict[str, np.ndarray]:
        """The encoder's inputs with k samples an image."""
        random, signature = np.random.RandomState(0), self._manifest.signature
        feeds = {"x": x, "noise": random.standard_normal((len(x), k, signature.noise_dim)).astype(np.float32)}
        if signature.dither:
            feeds["dither"] = random.random_sample(x.shape).astype(np.float32)
        return feeds

    def _encode(self, x: np.ndarray) -> Work:
        encoder, feeds = self._sessions["encoder"], self._inputs(x, 1)
        return lambda: encoder.run(["loc", "scale"], feeds)

    def _reconstruct(self, x: np.ndarray) -> Work:
        encoder, decoder, feeds = self._sessions["encoder"], self._sessions["decoder"], self._inputs(x, 1)
        return lambda: decoder.run(["mean"], {"z": encoder.run(["loc"], feeds)[0]})

    def _sample(self, x: np.ndarray) -> Work:
        latents = np.random.RandomState(0).standard_normal((len(x), self._manifest.signature.latent_dim))
        decoder, feeds = self._sessions["decoder"], {"z": latents.astype(np.float32)}
        return lambda: decoder.run(["mean"], feeds)

    def _score(self, x: np.ndarray) -> Work:
        encoder, decoder, density = (self._sessions[role] for role in ("encoder", "decoder", "density"))
        manifest, names = self._manifest, self._manifest.likelihood.parameters
        k, n = manifest.scores[manifest.default_score].k, len(x)
        feeds = self._inputs(x, k)

        def score() -> object:
            target, z, log_q = encoder.run(["target", "z", "log_q"], feeds)
            decoded = decoder.run(names, {"z": z.reshape(n * k, -1)})
            parameters = {name: value.reshape(n, k, *x.shape[1:]) for name, value in zip(names, decoded, strict=True)}
            log_p_x, log_p_z = density.run(["log_p_x", "log_p_z"], {"target": target, "z": z, **parameters})
            return (log_p_x + log_p_z - log_q).mean(axis=1)

        return score


def calls_per_second(work: Work, callers: int, seconds: float) -> float:
    """Calls/s of ``work`` from so many threads at once, each for ``seconds`` and at least twice."""
    started = time.perf_counter()

    def caller() -> int:
        calls = 0
        while calls < 2 or time.perf_counter() - started < seconds:
            work()
            calls += 1
        return calls

    if callers == 1:
        calls = caller()
    else:
        with ThreadPoolExecutor(callers) as pool:
            calls = sum(future.result() for future in [pool.submit(caller) for _ in range(callers)])
    return calls / (time.perf_counter() - started)


def cpu_per_call(work: Work, seconds: float) -> float:
    """CPU seconds of a call of ``work`` on one thread, over ``seconds`` and at least two calls."""
    calls, began, started = 0, time.thread_time(), time.perf_counter()
    while calls < 2 or time.perf_counter() - started < seconds:
        work()
        calls += 1
    return (time.thread_time() - began) / calls

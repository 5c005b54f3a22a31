"""The graphs of one bundle, each run so that a row's outputs do not depend on the rows beside it, bitwise.

Posterior samples go through the graphs a few at a time, and rows so that no array of a run holds more than MAX_ELEMENTS
numbers, or one sample of one row where that is more: the parts depend on the model and on k, never on N.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnxruntime as ort

from service.aligned import aligned_empty
from service.bundle.files import Bundle
from service.bundle.manifest import REFERENCE, Graph
from service.bundle.operators import check_operators, check_signature
from service.errors import BundleGraphError
from service.inference import noise
from service.inference.backbone import FeatureExtractor
from service.inference.batch_invariance import TWO_PATHS, Arrays, BatchInvariantRunner, random_rows, sizes_in
from service.inference.row_sums import samples_of_aligned_rows
from service.inference.sessions import Runtime
from service.scores.corruption import SIZES as CORRUPTION_SIZES

SAMPLE_CHUNKS = (1, 8, 32)
"""How many posterior samples of a row may go through the graphs at once."""
MAX_ELEMENTS = 2**21
"""Most numbers of one decoder output, rows × samples × C·H·W, that go through the graphs at once."""


class Joint(NamedTuple):
    """The two terms of log p(x,z), of n rows at k latents each, in nats.

    ``log_p_x_given_z``: log p(x|z), float64 [n,k]. ``log_p_z``: log p(z), float64 [n,k]. ``log_p_x_given_z_map``:
    log p(x|z) by place, float32 [n,k,C,H,W], or [n,k,0] where it was not asked for. Of a model without a likelihood
    minus its reconstruction error stands for log p(x|z), in the unit of its scores.
    """

    log_p_x_given_z: np.ndarray
    log_p_z: np.ndarray
    log_p_x_given_z_map: np.ndarray


class GraphRunners:
    """Runs each graph of one bundle, on rows whose type, shape and range were checked. Safe between threads.

    ``nodes``: how many operators each graph has. ``backbone``: the network that stands before the model, or None.
    """

    def __init__(
        self,
        bundle: Bundle,
        runtime: Runtime,
        sessions: Mapping[Graph, ort.InferenceSession],
        serial: frozenset[Graph],
        aligned: Mapping[Graph, frozenset[int]],
        nodes: Mapping[Graph, int],
    ) -> None:
        """``sessions``: one of each of the manifest's graphs. ``serial``: the graphs that run on one thread, in batches
        of whole vectors (service.inference.batch_invariance). ``aligned``: at how many samples a row the rows of a
        graph may run together (service.inference.row_sums)."""
        self.nodes = nodes
        self._bundle, self._manifest, self._runtime = bundle, bundle.manifest, runtime
        self._sessions, self._serial, self._aligned = sessions, serial, aligned
        signature = bundle.manifest.signature
        self._shape, self._latent_dim, self._noise_dim = signature.shape, signature.latent_dim, signature.noise_dim
        self._parameters, self._fit = bundle.manifest.likelihood.parameters, bundle.manifest.likelihood.fit_output
        self._elements = math.prod(self._shape)
        self._chunks = [chunk for chunk in SAMPLE_CHUNKS if chunk == 1 or chunk * self._elements <= MAX_ELEMENTS]
        self._max_rows = max(sizes_in(runtime.memory))
        self._encoders: dict[int, BatchInvariantRunner] = {}
        self._lock = threading.Lock()
        self._decoder = self._runner("decoder", random_rows({"z": (self._latent_dim,)}))
        # A row of the joint is one sample of one x. Where such rows must run alone (odd sizes, see batch_invariance) a
        # row is one x with all its samples.
        self._joint = self._runner("joint", self._joint_rows)
        self._joint_by_x = self._runner("joint", self._joint_rows, sizes=(1,))
        self._observation = self._optional("observation", self._joint_rows, sizes=(1,))
        self._prior = self._optional("prior", self._prior_rows)
        self._corruption = self._optional("corruption", lambda n: {"x": self.typical_rows(n)}, sizes=CORRUPTION_SIZES)
        self.backbone = self._feature_extractor()

    @classmethod
    def load(cls, bundle: Bundle, runtime: Runtime) -> GraphRunners:
        """Check the bundle's graphs and start a session for each.

        Raises BundleGraphError (operators, external data, another signature), BundleIntegrityError (a file changed
        since open_bundle), DeviceUnavailable.
        """
        sessions: dict[Graph, ort.InferenceSession] = {}
        serial: set[Graph] = set()
        aligned: dict[Graph, frozenset[int]] = {}
        nodes: dict[Graph, int] = {}
        for role in bundle.manifest.graphs:
            data = bundle.graph(role)
            try:
                operators = check_operators(data)
                nodes[role] = operators.total()
                if TWO_PATHS & operators.keys() or role == "joint":
                    serial.add(role)
                sessions[role] = runtime.session(data, threads=1 if role in serial else None)
                check_signature(sessions[role], bundle.manifest, role)
                samples = SAMPLE_CHUNKS if role == "encoder" else (1,)
                aligned[role] = samples_of_aligned_rows(data, operators, runtime, samples)
            except BundleGraphError as error:
                raise BundleGraphError(f"{bundle.manifest.graphs[role]}: {error}") from error
        return cls(bundle, runtime, sessions, frozenset(serial), aligned, nodes)

    @property
    def batch_sizes(self) -> dict[str, tuple[int, ...]]:
        """The batch sizes in use by graph, as far as runners were made; of the encoder by samples a run."""
        with self._lock:
            encoders = {f"encoder[k={k}]": runner.sizes for k, runner in self._encoders.items()}
        corruption = {} if self._corruption is None else {"corruption": self._corruption.sizes}
        return {**encoders, "decoder": self._decoder.sizes, "joint": self._joint.sizes, **corruption}

    def rows_at_once(self, k: int) -> int:
        """Largest number of rows that may go through the graphs of a score at once, at k samples each."""
        return min(self._max_rows, max(1, MAX_ELEMENTS // (self._chunk(self.distinct_samples(k)) * self._elements)))

    def distinct_samples(self, k: int) -> int:
        """Number of k posterior samples that differ: 1 of an encoder that takes no noise."""
        return k if self._noise_dim else 1

    def encode(self, x: np.ndarray, k: int, seed: int, outputs: Sequence[str] | None = None) -> Iterator[Arrays]:
        """The encoder's ``outputs`` for rows x, all by default, for a chunk of the seed's k samples at a time.

        An encoder that takes no noise gives one sample, whatever k.
        """
        shared = {"dither": noise.dither(seed, self._shape)} if self._manifest.signature.dither else {}
        if not self._noise_dim:
            yield self._encoder(1).run({"x": x}, shared, outputs)
            return
        start = 0
        while start < k:
            chunk = self._chunk(k - start)
            drawn = min(chunk, k - start)
            shared["noise"] = noise.posterior_chunk(seed, k, self._noise_dim, start, chunk)
            encoded = self._encoder(chunk).run({"x": x}, shared, outputs)
            yield encoded | {name: encoded[name][:, :drawn] for name in ("z", "log_q_z") if name in encoded}
            start += chunk

    def decode(self, z: np.ndarray, outputs: Sequence[str] | None = None) -> Arrays:
        """The decoder's ``outputs`` for latents z, float32 [M,L], all by default: float32 [M,C,H,W] each."""
        return self._decoder.run({"z": z}, outputs=outputs)

    def joint(self, target: np.ndarray, z: np.ndarray, decoded: Arrays | None = None, by_place: bool = True) -> Joint:
        """log p(x,z) of targets, float32 [n,C,H,W], at latents z, float32 [n,k,L]; ``by_place``: the map, too.

        ``decoded``: the decoder's outputs for z, where these were computed before.
        """
        n, k, latent_dim = z.shape
        outputs = [self._fit, "log_p_z", *([f"{self._fit}_map"] if by_place else [])]
        if decoded is None:
            decoded = self.decode(z.reshape(n * k, latent_dim), self._parameters)
        parameters = {name: decoded[name] for name in self._parameters}
        if self._joint.sizes == (1,):
            parameters = {name: value.reshape(n, k, *self._shape) for name, value in parameters.items()}
            results = self._joint_by_x.run({"target": target, "z": z, **parameters}, outputs=outputs)
        else:
            feeds = {"target": _repeated(target, k), "z": z.reshape(n * k, 1, latent_dim)}
            feeds |= {name: value[:, None] for name, value in parameters.items()}
            results = self._joint.run(feeds, outputs=outputs)
        by_places = np.empty((n, k, 0), np.float32)
        if by_place:
            by_places = results[f"{self._fit}_map"].reshape(n, k, *self._shape)
        return Joint(results[self._fit].reshape(n, k), results["log_p_z"].reshape(n, k), by_places)

    def observe(self, z: np.ndarray, observation_noise: np.ndarray | None) -> np.ndarray:
        """Draws x ~ p(x|z), float32 [M,C,H,W], for latents z, float32 [M,L].

        ``observation_noise``: float32 [M,C,H,W], None where likelihood.observation_noise is "none".
        """
        assert self._observation is not None, "the verb is refused where this graph is missing"
        decoded = self.decode(z)
        feeds = {name: decoded[name] for name in self._parameters}
        if observation_noise is not None:
            feeds["noise"] = observation_noise
        return self._observation.run(feeds)["sample"]

    def draw_prior(self, prior_noise: np.ndarray) -> np.ndarray:
        """Latents z, float32 [n,L], from rows of ``draw_prior_noise``; the noise itself without a prior graph."""
        if self._prior is None:
            return prior_noise
        if not self._manifest.prior.choice:
            return self._prior.run({"noise": prior_noise})["z"]
        gaussian, choice = np.ascontiguousarray(prior_noise[:, :-1]), np.ascontiguousarray(prior_noise[:, -1])
        return self._prior.run({"noise": gaussian, "choice": choice})["z"]

    def log_odds(self, x: np.ndarray) -> np.ndarray:
        """Log odds in nats that a place was painted over, float32 [N,H,W], of images x, float32 [N,C,H,W].

        Raises BundleGraphError for log odds that are not finite: of pixels in [0, 1] no sound graph gives such.
        """
        assert self._corruption is not None, "the verb is refused where this graph is missing"
        log_odds = self._corruption.run({"x": x})["log_odds"]
        finite = np.isfinite(log_odds).all(axis=(1, 2))
        if not finite.all():
            row = int(np.argmin(finite))
            first = float(log_odds[row][~np.isfinite(log_odds[row])][0])
            raise BundleGraphError(f"the model's corruption is {first} for row {row}")
        return log_odds

    def run_at_once(self, role: Graph, feeds: Arrays) -> Arrays:
        """One graph's outputs for all rows of ``feeds`` in a single run, however they round: for verification."""
        if role == "backbone" and self.backbone is not None:
            return self.backbone.run_at_once(feeds)
        session = self._sessions[role]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))

    def typical_rows(self, n: int) -> np.ndarray:
        """Rows for trials, all different, float32 [n,C,H,W]: random pixels, or mixtures of the reference's rows.

        Other numbers than pixels are in units of their own: far from the data a network's units may all be saturated,
        and tell nothing of how it rounds.
        """
        random = np.random.RandomState(0)
        if self._manifest.modelled.kind == "image":
            return random.random_sample((n, *self._shape)).astype(np.float32)
        reference = self._bundle.arrays(REFERENCE)["x"]
        a, b = (reference[random.randint(len(reference), size=n)] for _ in range(2))
        t = random.random_sample((n, 1, 1, 1))
        return ((a + t * (b - a)) * (1 + 0.01 * random.standard_normal(a.shape))).astype(np.float32)

    def _chunk(self, samples: int) -> int:
        """Number of samples a row that go through the graphs next, of so many that are left; some may be padding."""
        return next((size for size in self._chunks if size >= samples), self._chunks[-1])

    def _runner(
        self, role: Graph, trial_rows: Callable[[int], Arrays], sizes: tuple[int, ...] | None = None, samples: int = 1
    ) -> BatchInvariantRunner:
        """The runner of the graph ``role``, for so many samples a row; ``sizes``: the batch sizes to try."""
        if samples not in self._aligned[role]:
            sizes = (1,)
        session, is_serial = self._sessions[role], role in self._serial
        threads, memory = self._runtime.row_threads, self._runtime.memory
        return BatchInvariantRunner(session, trial_rows, sizes, is_serial, threads, memory)

    def _optional(
        self, role: Graph, trial_rows: Callable[[int], Arrays], sizes: tuple[int, ...] | None = None
    ) -> BatchInvariantRunner | None:
        """The runner of a graph that a bundle need not have, or None."""
        return self._runner(role, trial_rows, sizes) if role in self._sessions else None

    def _encoder(self, chunk: int) -> BatchInvariantRunner:
        """The encoder's runner for so many samples a row: of few sizes, since each is tried for row independence."""
        if (runner := self._encoders.get(chunk)) is not None:
            return runner
        with self._lock:
            if chunk not in self._encoders:
                shapes: dict[str, tuple[int, ...]] = {"x": self._shape}
                if self._noise_dim:
                    shapes["noise"] = (chunk, self._noise_dim)
                if self._manifest.signature.dither:
                    shapes["dither"] = self._shape
                draw = random_rows(shapes, frozenset({"x", "dither"}))
                self._encoders[chunk] = self._runner(
                    "encoder", lambda n: draw(n) | {"x": self.typical_rows(n)}, samples=chunk
                )
            return self._encoders[chunk]

    def _feature_extractor(self) -> FeatureExtractor | None:
        manifest, runtime = self._manifest, self._runtime
        if manifest.backbone is None:
            return None
        session, image = self._sessions["backbone"], manifest.preprocessing.shape
        aligned, is_serial = bool(self._aligned["backbone"]), "backbone" in self._serial
        threads, memory = runtime.row_threads, runtime.memory
        return FeatureExtractor(session, manifest.backbone, image, aligned, is_serial, threads, memory)

    def _joint_rows(self, n: int) -> Arrays:
        """Inputs of the joint graph at one sample each of n typical rows, for trials."""
        encoded = next(self.encode(self.typical_rows(n), 1, 0))
        decoded = self.decode(encoded["z"][:, 0])
        parameters = {name: decoded[name][:, None] for name in self._parameters}
        return {"target": encoded["target"], "z": encoded["z"]} | parameters

    def _prior_rows(self, n: int) -> Arrays:
        """Inputs of the prior graph for n draws, for trials."""
        shapes: dict[str, tuple[int, ...]] = {"noise": (self._manifest.prior.noise_dim or 0,)}
        if self._manifest.prior.choice:
            shapes["choice"] = ()
        return random_rows(shapes, frozenset({"choice"}))(n)


def _repeated(rows: np.ndarray, times: int) -> np.ndarray:
    """Repeat each row so many times in one aligned array, whose batches need not be copied."""
    repeated = aligned_empty((len(rows) * times, *rows.shape[1:]), rows.dtype)
    repeated.reshape(len(rows), times, *rows.shape[1:])[:] = rows[:, None]
    return repeated

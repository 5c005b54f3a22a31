"""Model: one bundle, loaded, answering on arrays. Every number that leaves vaeserve is computed here.

Rows are independent, bitwise: N images (or latents) together give what N single calls give, since every row sees the
same noise, graphs run through service.rows, and reductions run a row at a time. A score's work is cut into parts that
depend on the model and on k, never on N: beside x, the answer and the parts of log w, [N,k] each, it holds up to
some 8 arrays of MAX_ELEMENTS float32 numbers (64 MB), or of one sample of one image where that is more.

>>> model = Model.load(open_bundle("exported/digits/1"), Runtime("cpu"))  # doctest: +SKIP
>>> model.score(images).score  # doctest: +SKIP
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import onnxruntime as ort

from service import estimators, noise
from service.bundle import Bundle, Graph, ScoreDefinition
from service.errors import BundleGraphError, InvalidInput, UnsupportedVerb
from service.graphs import check_operators, check_signature
from service.rows import SIZES, TWO_PATHS, Arrays, RowRunner, random_rows
from service.runtime import Runtime

SAMPLE_CHUNKS = (1, 8, 32)  # posterior samples of an image that go through the graphs at once
MAX_ELEMENTS = 2**21  # of one decoder output: images × samples × C·H·W that go through the graphs at once
MAX_TEMPERATURE = 1000
IMAGES = 32  # images that go through the graphs at once, at most


class Posterior(NamedTuple):
    """q(z|x) of N images: ``loc``, ``scale`` [N,L] and S seeded draws ``samples`` [N,S,L]; float32."""

    loc: np.ndarray
    scale: np.ndarray
    samples: np.ndarray


class Scores(NamedTuple):
    """Scores of N images, float64 [N], in nats but for ``bits_per_dim``; log w as in service.estimators.

    ``score``: minus the bound of the definition's estimator, higher is more anomalous. ``elbo``: (1/k) Σ log w.
    ``log_likelihood``: log (1/k) Σ w. ``rate``: mean of log q(z|x) − log p(z). ``distortion``: mean of −log p(x|z).
    ``bits_per_dim``: of the estimator's bound. ``standard_error``: Monte-Carlo error of ``score``, NaN when k = 1.
    ``map``: per-pixel distortion summed over channels, float32 [N,H,W], or None.
    """

    score: np.ndarray
    elbo: np.ndarray
    log_likelihood: np.ndarray
    rate: np.ndarray
    distortion: np.ndarray
    bits_per_dim: np.ndarray
    standard_error: np.ndarray
    k: int
    map: np.ndarray | None


class Weights(NamedTuple):
    """The parts of log w at k samples, each [N,k] float64, and the per-pixel distortion's sum [N,H,W], else [N,0]."""

    log_p_x: np.ndarray
    log_p_z: np.ndarray
    log_q: np.ndarray
    distortion_map: np.ndarray


class Model:
    """A bundle in memory. Made by ``Model.load``; safe to call from several threads.

    ``bundle``, ``manifest`` and ``digest`` tell what was loaded, ``runtime`` on what.
    """

    def __init__(
        self,
        bundle: Bundle,
        runtime: Runtime,
        sessions: dict[Graph, ort.InferenceSession],
        serial: frozenset[Graph],
    ) -> None:
        self.bundle, self.manifest, self.digest, self.runtime = bundle, bundle.manifest, bundle.digest, runtime
        signature = self.manifest.signature
        self._shape, self._latent_dim, self._noise_dim = signature.shape, signature.latent_dim, signature.noise_dim
        self._parameters = self.manifest.likelihood.parameters
        self._sessions, self._serial = sessions, serial
        self._encoders: dict[int, RowRunner] = {}
        self._lock = threading.Lock()
        self._decoder = self._runner("decoder", random_rows({"z": (self._latent_dim,)}))
        # A row of the density is one sample of one image. Where such rows must run alone (odd sizes, see service.rows)
        # a row is one image with all its samples.
        self._density = self._runner("density", self._density_rows)
        self._density_by_image = self._runner("density", self._density_rows, sizes=(1,))
        self._observation = (
            self._runner("observation", self._density_rows, sizes=(1,)) if "observation" in sessions else None
        )
        self._dimensions = math.prod(self._shape)
        self._chunks = [chunk for chunk in SAMPLE_CHUNKS if chunk == 1 or chunk * self._dimensions <= MAX_ELEMENTS]

    @classmethod
    def load(cls, bundle: Bundle, runtime: Runtime) -> Model:
        """Check the bundle's graphs and start a session for each.

        Raises BundleGraphError (operators, external data, another signature), BundleIntegrityError (a file changed
        since open_bundle), DeviceUnavailable.
        """
        sessions: dict[Graph, ort.InferenceSession] = {}
        serial: set[Graph] = set()
        for role in bundle.manifest.graphs:
            data = bundle.graph(role)
            try:
                if TWO_PATHS & check_operators(data).keys() or role == "density":
                    serial.add(role)
                sessions[role] = runtime.session(data, threads=1 if role in serial else None)
                check_signature(sessions[role], bundle.manifest, role)
            except BundleGraphError as error:
                raise BundleGraphError(f"{bundle.manifest.graphs[role]}: {error}") from error
        return cls(bundle, runtime, sessions, frozenset(serial))

    @property
    def runners(self) -> dict[str, tuple[int, ...]]:
        """The batch sizes in use by each runner made so far (a fact to log): encoder runners by samples a run."""
        with self._lock:
            encoders = {f"encoder[k={k}]": runner.sizes for k, runner in self._encoders.items()}
        return {**encoders, "decoder": self._decoder.sizes, "density": self._density.sizes}

    def warm_up(self) -> None:
        """Run every graph once, with the default score and one sample, so that no request pays for first uses."""
        grey = np.full((1, *self._shape), 0.5, np.float32)
        self.score(grey)
        self.encode(grey, samples=1)
        latents = self.sample_latents(1)
        if self._observation is not None:
            self.observe(latents)
        else:
            self.decode(latents)

    def encode(self, x: np.ndarray, samples: int = 0, seed: int = 0) -> Posterior:
        """q(z|x) of images x, float32 [N,C,H,W] in [0, 1], with ``samples`` draws from the seed's noise.

        Raises InvalidInput.
        """
        x = self._images(x)
        _check_count("samples", samples, 0)
        # Of each chunk only this is kept: its target is as large as x.
        outputs = self._encode(x, max(samples, 1), _checked_seed(seed))
        chunks = [(output["loc"], output["scale"], output["z"]) for output in outputs]
        draws = np.concatenate([z for _, _, z in chunks], axis=1)[:, :samples]
        return Posterior(chunks[0][0], chunks[0][1], draws)

    def decode(self, z: np.ndarray) -> np.ndarray:
        """E[x|z], float32 [M,C,H,W], of latents z, float32 [M,L]. Raises InvalidInput."""
        return self._decoder.run({"z": self._latents(z)})["mean"]

    def observe(self, z: np.ndarray, seed: int | Sequence[int] = 0) -> np.ndarray:
        """A draw x ~ p(x|z), float32 [M,C,H,W], for each latent of z, float32 [M,L].

        One seed gives every row the same noise (so that rows are independent of their neighbours); for draws that are
        independent of each other give a seed a row. Raises InvalidInput, and UnsupportedVerb without such a graph.
        """
        if self._observation is None:
            raise UnsupportedVerb(f"{self.manifest.name} has no observation graph: it gives E[x|z], not draws of x")
        z = self._latents(z)
        seeds = [seed] * len(z) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(z):
            raise InvalidInput(f"{len(seeds)} seeds for {len(z)} latents; expected one, or one each")
        distribution = self.manifest.likelihood.observation_noise
        decoded = self._decoder.run({"z": z})
        feeds = {name: decoded[name] for name in self._parameters}
        draws = [noise.observation_noise(_checked_seed(number), self._shape, distribution) for number in seeds]
        return self._observation.run(feeds | {"noise": np.stack(draws)})["sample"]

    def reconstruct(self, x: np.ndarray, seed: int = 0) -> np.ndarray:
        """E[x|z] at z = loc of q(z|x), float32 [N,C,H,W]; the seed is that of a dither. Raises InvalidInput."""
        return self.decode(self.encode(x, seed=seed).loc)

    def sample_latents(self, n: int, seed: int = 0, temperature: float = 1.0) -> np.ndarray:
        """n draws of the prior, its deviation scaled by ``temperature``: float32 [n,L]. Raises InvalidInput."""
        _check_count("n", n, 1)
        if not 0 <= temperature <= MAX_TEMPERATURE:
            raise InvalidInput(f"temperature is {temperature}, expected a number from 0 to {MAX_TEMPERATURE}")
        return self._latents(noise.prior_noise(_checked_seed(seed), n, self._latent_dim) * np.float32(temperature))

    def interpolate(self, a: np.ndarray, b: np.ndarray, steps: int, mode: str = "lerp") -> np.ndarray:
        """Latents from a to b, both [L], ends included: float32 [steps,L].

        ``lerp`` goes straight, ``slerp`` along the great circle (Shoemake 1985), keeping the norm that a Gaussian prior
        expects. Raises InvalidInput; also for slerp between opposite latents, which no single great circle joins.
        """
        _check_count("steps", steps, 2)
        start, stop = (self._latents(np.asarray(end)[None])[0].astype(np.float64) for end in (a, b))
        t = np.linspace(0.0, 1.0, steps)[:, None]
        if mode not in ("lerp", "slerp"):
            raise InvalidInput(f"mode is {mode!r}, expected lerp or slerp")
        path = start + t * (stop - start) if mode == "lerp" else _slerp(start, stop, t)
        path[0], path[-1] = start, stop
        return path.astype(np.float32)

    def score(self, x: np.ndarray, definition: ScoreDefinition | None = None, maps: bool = False) -> Scores:
        """Scores of images x, float32 [N,C,H,W] in [0, 1], by ``definition`` or the bundle's default one.

        Raises InvalidInput, and BundleGraphError where the model itself yields NaN.
        """
        definition = definition or self.manifest.scores[self.manifest.default_score]
        x = self._images(x)
        images = min(IMAGES, max(1, MAX_ELEMENTS // (self._chunk(definition.k) * self._dimensions)))
        parts = [self._weights(x[i : i + images], definition, maps) for i in range(0, len(x), images)]
        weights = Weights(*(np.concatenate(part) for part in zip(*parts, strict=True)))
        log_w = weights.log_p_x + weights.log_p_z - weights.log_q
        if np.isnan(log_w).any():
            raise BundleGraphError(f"the model's log w is NaN for row {int(np.argmax(np.isnan(log_w).any(axis=1)))}")
        elbo, log_likelihood = estimators.elbo(log_w), estimators.log_mean_exp(log_w)
        bound = elbo if definition.estimator == "elbo" else log_likelihood
        return Scores(
            score=-bound,
            elbo=elbo,
            log_likelihood=log_likelihood,
            rate=(weights.log_q - weights.log_p_z).mean(axis=1),
            distortion=-weights.log_p_x.mean(axis=1),
            bits_per_dim=estimators.bits_per_dim(bound, self._dimensions, self.manifest.likelihood.measure),
            standard_error=estimators.standard_error(log_w, definition.estimator),
            k=definition.k,
            map=(weights.distortion_map / definition.k).astype(np.float32) if maps else None,
        )

    def run_graph(self, role: Graph, feeds: Arrays) -> Arrays:
        """One graph's outputs for all rows of ``feeds`` in a single run: for verification."""
        session = self._sessions[role]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))

    def _weights(self, x: np.ndarray, definition: ScoreDefinition, maps: bool) -> Weights:
        """log p(x|z), log p(z) and log q(z|x) of a few images at the definition's k samples; the map only if asked."""
        distortion_map = np.zeros((len(x), *self._shape[1:]) if maps else (len(x), 0))
        parts: list[tuple[np.ndarray, ...]] = []
        for encoded in self._encode(x, definition.k, definition.seed):
            log_p_x, log_p_z, log_p_x_map = self._densities(encoded["target"], encoded["z"])
            parts.append((log_p_x, log_p_z, encoded["log_q"]))
            if maps:
                distortion_map -= np.stack([row.sum(axis=(0, 1), dtype=np.float64) for row in log_p_x_map])
        log_p_x, log_p_z, log_q = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        return Weights(log_p_x, log_p_z, log_q, distortion_map)

    def _densities(self, target: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log p(x|z) and log p(z), float64 [n,k], and log p(x|z) by pixel, float32 [n,k,C,H,W]."""
        n, k, latent_dim = z.shape
        decoded = self._decoder.run({"z": z.reshape(n * k, latent_dim)})
        parameters = {name: decoded[name] for name in self._parameters}
        if self._density.sizes == (1,):
            parameters = {name: value.reshape(n, k, *self._shape) for name, value in parameters.items()}
            outputs = self._density_by_image.run({"target": target, "z": z, **parameters})
        else:
            feeds = {"target": np.repeat(target, k, axis=0), "z": z.reshape(n * k, 1, latent_dim)}
            feeds |= {name: value[:, None] for name, value in parameters.items()}
            outputs = self._density.run(feeds)
        log_p_x_map = outputs["log_p_x_map"].reshape(n, k, *self._shape)
        return outputs["log_p_x"].reshape(n, k), outputs["log_p_z"].reshape(n, k), log_p_x_map

    def _encode(self, x: np.ndarray, k: int, seed: int) -> Iterator[Arrays]:
        """The encoder's outputs for x, a chunk of the seed's k samples at a time."""
        draws = noise.posterior_noise(seed, k, self._noise_dim)
        feeds = {"x": x}
        if self.manifest.signature.dither:
            feeds["dither"] = np.broadcast_to(noise.dither(seed, self._shape), x.shape)
        start = 0
        while start < k:
            chunk = self._chunk(k - start)
            rows = draws[start : start + chunk]
            padded = np.zeros((chunk, self._noise_dim), np.float32)
            padded[: len(rows)] = rows
            outputs = self._encoder(chunk).run(feeds | {"noise": np.broadcast_to(padded, (len(x), *padded.shape))})
            yield outputs | {name: outputs[name][:, : len(rows)] for name in ("z", "log_q")}
            start += chunk

    def _chunk(self, samples: int) -> int:
        """How many of so many samples an image go through the graphs next, some of them padding."""
        return next((size for size in self._chunks if size >= samples), self._chunks[-1])

    def _runner(self, role: Graph, trial_rows: Callable[[int], Arrays], sizes: tuple[int, ...] = SIZES) -> RowRunner:
        """The graph's runner. A session of one thread leaves it to Python threads to run several batches at once."""
        serial = role in self._serial
        return RowRunner(self._sessions[role], trial_rows, sizes, serial, self.runtime.pool if serial else None)

    def _encoder(self, chunk: int) -> RowRunner:
        """The runner for so many samples an image: few sizes, since each is tried for row independence."""
        with self._lock:
            if chunk not in self._encoders:
                shapes: dict[str, tuple[int, ...]] = {"x": self._shape, "noise": (chunk, self._noise_dim)}
                if self.manifest.signature.dither:
                    shapes["dither"] = self._shape
                uniform = frozenset({"x", "dither"})
                self._encoders[chunk] = self._runner("encoder", random_rows(shapes, uniform))
            return self._encoders[chunk]

    def _density_rows(self, count: int) -> Arrays:
        """Inputs of the density graph at one sample each of random images, for trials."""
        x = np.random.RandomState(0).random_sample((count, *self._shape)).astype(np.float32)
        encoded = next(self._encode(x, 1, 0))
        decoded = self._decoder.run({"z": encoded["z"][:, 0]})
        return {"target": encoded["target"], "z": encoded["z"]} | {
            name: decoded[name][:, None] for name in self._parameters
        }

    def _images(self, x: np.ndarray) -> np.ndarray:
        """x as float32 [N,C,H,W], after its type, shape and range were checked."""
        x = _floats("x", x)
        if x.ndim != 4 or x.shape[1:] != self._shape or len(x) == 0:
            raise InvalidInput(f"x has shape {x.shape}, expected (N, {', '.join(map(str, self._shape))}) with N ≥ 1")
        for row, image in enumerate(x):
            low, high = image.min(), image.max()
            if not (low >= 0.0 and high <= 1.0):
                raise InvalidInput(f"x, row {row}: pixels span {low} to {high}, expected finite numbers in [0, 1]")
        return x

    def _latents(self, z: np.ndarray) -> np.ndarray:
        """z as float32 [M,L], after its type, shape and finiteness were checked."""
        z = _floats("z", z)
        if z.ndim != 2 or z.shape[1] != self._latent_dim or len(z) == 0:
            raise InvalidInput(f"z has shape {z.shape}, expected (M, {self._latent_dim}) with M ≥ 1")
        finite = np.isfinite(z).all(axis=1)
        if not finite.all():
            raise InvalidInput(f"z, row {int(np.argmin(finite))}: expected finite float32 numbers")
        return z


def _floats(name: str, value: np.ndarray) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind != "f":
        raise InvalidInput(f"{name} has dtype {array.dtype}, expected float32")
    with np.errstate(over="ignore"):  # a float64 beyond float32's range becomes ∞, which the callers refuse
        return array.astype(np.float32, copy=False)


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise InvalidInput(f"seed is {seed!r}, expected a whole number from 0 to 2³² − 1")
    return int(seed)


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InvalidInput(f"{name} is {value!r}, expected a whole number of at least {least}")


def _slerp(a: np.ndarray, b: np.ndarray, t: np.ndarray) -> np.ndarray:
    """sin((1−t)ω)/sin ω · a + sin(tω)/sin ω · b with ω the angle between a and b, [L] each; t is [steps,1]."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(np.clip(a @ b / norms, -1.0, 1.0)) if norms > 0 else 1.0
    omega = math.acos(cosine)
    if math.pi - omega < 1e-6:
        raise InvalidInput("slerp between opposite latents is undefined; use lerp")
    if omega < 1e-6:  # the formula's limit, and the only sensible path from or to the origin
        return a + t * (b - a)
    return cast(np.ndarray, (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / math.sin(omega))

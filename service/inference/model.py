"""Model: one bundle, loaded, answering on arrays. Every number that leaves vaeserve is computed here.

Rows (images, vectors, signals) are float32 [N,C,H,W] here, whatever shape the outside sees; of images also their 8-bit
levels, uint8, which stand for the pixels level/255. They are independent, bitwise: N of them (or of latents) together
give what N single calls give, since every row sees the same noise, graphs run through
service.inference.batch_invariance, and reductions run a row at a time. A score's work is cut into parts that depend on
the model and on k, never on N: beside x, the answer and the parts of log w, [N,k] each, it holds up to some 8 arrays of
MAX_ELEMENTS float32 numbers (64 MB), or of one sample of one row where that is more.

>>> model = Model.load(open_bundle("exported/digits/1"), Runtime("cpu"))  # doctest: +SKIP
>>> model.score(images).score  # doctest: +SKIP
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import cached_property
from typing import NamedTuple, cast

import numpy as np
import onnxruntime as ort

from service.aligned import aligned_empty
from service.bundle.capabilities import refusals
from service.bundle.manifest import FITTED, REFERENCE, Bundle, Graph, ScoreDefinition
from service.bundle.operators import check_operators, check_signature
from service.errors import BundleGraphError, InvalidInput, UnsupportedVerb
from service.formats.images import unit_levels
from service.inference import noise
from service.inference.backbone import FeatureExtractor
from service.inference.batch_invariance import TWO_PATHS, Arrays, BatchInvariantRunner, random_rows, sizes_in
from service.inference.sessions import Runtime
from service.inference.sharing import share
from service.scores import bounds as estimators
from service.scores.corruption import SIZES as CORRUPTION_SIZES
from service.scores.corruption import corruption_scores
from service.scores.detectors import detector_arrays, load_detectors, stretched
from service.scores.evaluation import Estimates, Passes
from service.scores.forward_pass import Measured
from service.scores.latent_contributions import DRAWS, Marginals, divergences, is_standard_normal
from service.scores.maps.anomaly_map import AnomalyMap, MapKind, Sight, load_map

SAMPLE_CHUNKS = (1, 8, 32)  # posterior samples of a row that go through the graphs at once
MAX_ELEMENTS = 2**21  # of one decoder output: rows × samples × C·H·W that go through the graphs at once
MAX_TEMPERATURE = 1000
NO_MAP = "nothing was fitted for it: `vaeserve calibrate` or `vaetrain calibrate` write a bundle that has it"


class Encoding(NamedTuple):
    """q(z|x) of N rows: ``loc``, ``scale`` [N,L] and S seeded draws ``samples`` [N,S,L]; float32.

    What loc and scale are of q is said by the manifest's ``posterior``.
    """

    loc: np.ndarray
    scale: np.ndarray
    samples: np.ndarray


class Scores(NamedTuple):
    """Scores of N rows, float64 [N], in nats but for ``bits_per_dim``; log w as in service.scores.bounds.

    ``score``: minus the estimate of the definition's estimator, higher is more anomalous. ``elbo``: (1/k) Σ log w.
    ``log_likelihood``: log (1/k) Σ w. ``rate``: mean of log q(z|x) − log p(z). ``distortion``: mean of −log p(x|z).
    ``bits_per_dim``: of the estimator's bound. ``standard_error``: Monte-Carlo error of ``score``, NaN when k = 1.
    ``map``: by place, float32 [N,H,W], or None: the anomaly map (service.scores.maps.anomaly_map), the distortion,
    summed over channels, or the log odds in nats that the place was painted over (service.scores.corruption).
    ``latents``: KL divergences by latent dimension that make up the rate (service.scores.latent_contributions), [N,L],
    or None.
    ``also``: further scores by name.

    What a model does not have is NaN: of these elbo, log_likelihood and rate without a likelihood (score and distortion
    are then in the definition's unit); rate where the encoder is deterministic, distortion where it is a bijection
    besides; bits_per_dim where the score is no bound, or p(x) a density over other numbers than pixels.
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
    latents: np.ndarray | None
    also: dict[str, np.ndarray]


class Model:
    """A bundle in memory. Made by ``Model.load``; safe to call from several threads.

    ``bundle``, ``manifest`` and ``digest`` tell what was loaded, ``runtime`` on what, ``nodes`` how many each graph
    has, ``refused`` which verbs it cannot answer and why (service.bundle.capabilities).
    """

    def __init__(
        self,
        bundle: Bundle,
        runtime: Runtime,
        sessions: dict[Graph, ort.InferenceSession],
        serial: frozenset[Graph],
        nodes: dict[Graph, int],
    ) -> None:
        self.nodes = nodes
        self.bundle, self.manifest, self.digest, self.runtime = bundle, bundle.manifest, bundle.digest, runtime
        self.refused = refusals(self.manifest)
        fitted = detector_arrays(bundle)
        self.detectors = load_detectors(self.manifest, fitted)
        self.anomaly_map: AnomalyMap | None = load_map(self.manifest, fitted)
        if self.anomaly_map is None:
            self.refused.setdefault("score.map.anomaly", NO_MAP)
        signature = self.manifest.signature
        self._shape, self._latent_dim, self._noise_dim = signature.shape, signature.latent_dim, signature.noise_dim
        self._parameters = self.manifest.likelihood.parameters
        self._sessions, self._serial = sessions, serial
        self._rows = max(sizes_in(runtime.memory))  # that go through the graphs of a score at once, at most
        self._encoders: dict[int, BatchInvariantRunner] = {}
        self._lock = threading.Lock()
        self._decoder = self._runner("decoder", random_rows({"z": (self._latent_dim,)}))
        # A row of the density is one sample of one x. Where such rows must run alone (odd sizes, see batch_invariance)
        # a row is one x with all its samples.
        self._density = self._runner("density", self._density_rows)
        self._density_by_x = self._runner("density", self._density_rows, sizes=(1,))
        self._observation = (
            self._runner("observation", self._density_rows, sizes=(1,)) if "observation" in sessions else None
        )
        self._prior = self._runner("prior", self._prior_rows) if "prior" in sessions else None
        self._corruption = (
            self._runner("corruption", lambda count: {"x": self._typical(count)}, sizes=CORRUPTION_SIZES)
            if "corruption" in sessions
            else None
        )
        self._backbone: FeatureExtractor | None = None
        if self.manifest.backbone is not None:
            self._backbone = FeatureExtractor(
                sessions["backbone"],
                self.manifest.backbone,
                self.manifest.preprocessing.shape,
                "backbone" in serial,
                runtime.row_threads,
                runtime.memory,
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
        nodes: dict[Graph, int] = {}
        for role in bundle.manifest.graphs:
            data = bundle.graph(role)
            try:
                operators = check_operators(data)
                nodes[role] = operators.total()
                if TWO_PATHS & operators.keys() or role == "density":
                    serial.add(role)
                sessions[role] = runtime.session(data, threads=1 if role in serial else None)
                check_signature(sessions[role], bundle.manifest, role)
            except BundleGraphError as error:
                raise BundleGraphError(f"{bundle.manifest.graphs[role]}: {error}") from error
        return cls(bundle, runtime, sessions, frozenset(serial), nodes)

    @property
    def runners(self) -> dict[str, tuple[int, ...]]:
        """The batch sizes in use by each runner made so far (a fact to log): encoder runners by samples a run."""
        with self._lock:
            encoders = {f"encoder[k={k}]": runner.sizes for k, runner in self._encoders.items()}
        corruption = {} if self._corruption is None else {"corruption": self._corruption.sizes}
        return {**encoders, "decoder": self._decoder.sizes, "density": self._density.sizes, **corruption}

    def warm_up(self, pool: Executor | None = None) -> None:
        """Run every graph once, with the default score and one sample, so that no request pays for first uses.

        Idle threads of ``pool`` take a part of it.
        """
        x, behind = self._typical(1), self.without_backbone()
        works: list[Callable[[], object]] = [lambda: behind.score(x)]
        if self._backbone is not None:
            image = self._backbone.image
            works.append(lambda: self.features(random_rows({"x": image}, frozenset({"x"}))(1)["x"]))
        if "decode" not in self.refused:
            works.append(lambda: self._warm_up_decoding(behind.encode(x).loc))
        else:
            works.append(lambda: behind.encode(x))
        if self._corruption is not None:
            works.append(lambda: self.corruption(x))
        share(works, pool)

    def _warm_up_decoding(self, latents: np.ndarray) -> None:
        if self._prior is not None:
            self.sample_latents(1)
        if self._observation is not None:
            self.observe(latents)
        else:
            self.decode(latents)

    def require(self, verb: str) -> None:
        """Raise UnsupportedVerb, with the reason, if ``verb`` is among ``refused``."""
        if verb in self.refused:
            raise UnsupportedVerb(f"{self.manifest.name} does not answer {verb}: {self.refused[verb]}")

    def require_map(self, kind: MapKind) -> None:
        """As ``require``, of maps of that kind. Log odds need no log p(x) that comes apart into places."""
        for verb in (["score.map"] if kind != "corruption" else []) + [f"score.map.{kind}"]:
            self.require(verb)

    def features(self, x: np.ndarray) -> np.ndarray:
        """What the model is of: float32 [N, *signature.shape], the backbone's features of images x, or x itself.

        Raises InvalidInput, also for a row whose features are not finite.
        """
        x = self._checked(x)
        return x if self._backbone is None else self._backbone.run(x)

    def without_backbone(self) -> Model:
        """The same model of rows whose features are known: its x are ``features``. Itself without a backbone."""
        if self._backbone is None:
            return self
        behind = copy.copy(self)
        behind._backbone = None
        return behind

    def encode(self, x: np.ndarray, samples: int = 0, seed: int = 0) -> Encoding:
        """q(z|x) of x, float32 [N,C,H,W] (images in [0, 1]), with ``samples`` draws from the seed's noise.

        Raises InvalidInput, and UnsupportedVerb for draws from a deterministic encoder.
        """
        x = self.features(x)
        _check_count("samples", samples, 0)
        if samples:
            self.require("encode.samples")
        seed = _checked_seed(seed)
        if not samples:  # the target, which is as large as x, does not leave the graph
            encoded = next(self._encode(x, 1, seed, ("loc", "scale")))
            return Encoding(encoded["loc"], encoded["scale"], np.empty((len(x), 0, self._latent_dim), np.float32))
        chunks = list(self._encode(x, samples, seed, ("loc", "scale", "z")))
        draws = np.concatenate([chunk["z"] for chunk in chunks], axis=1)
        return Encoding(chunks[0]["loc"], chunks[0]["scale"], draws)

    def decode(self, z: np.ndarray) -> np.ndarray:
        """E[x|z], float32 [M,C,H,W], of latents z, float32 [M,L]. Raises InvalidInput, UnsupportedVerb."""
        self.require("decode")
        return self._decoder.run({"z": self._latents(z)})["mean"]

    def observe(self, z: np.ndarray, seed: int | Sequence[int] = 0) -> np.ndarray:
        """A draw x ~ p(x|z), float32 [M,C,H,W], for each latent of z, float32 [M,L].

        One seed gives every row the same noise (so that rows are independent of their neighbours); for draws that are
        independent of each other give a seed a row. Raises InvalidInput, and UnsupportedVerb without such a graph.
        """
        self.require("decode.draw")
        assert self._observation is not None
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
        """E[x|z] at z = loc of q(z|x), float32 [N,C,H,W]; the seed is that of a dither.

        Raises InvalidInput, UnsupportedVerb.
        """
        self.require("reconstruct")
        return self.decode(self.encode(x, seed=seed).loc)

    def sample_latents(self, n: int, seed: int = 0, temperature: float = 1.0) -> np.ndarray:
        """n draws of the prior, float32 [n,L], the deviation of their noise scaled by ``temperature``.

        Which component of a mixture a draw comes from is left to the prior at any temperature. Raises InvalidInput, and
        UnsupportedVerb without a prior.
        """
        return self.latents_of(self.prior_noise(n, seed, temperature))

    def prior_noise(self, n: int, seed: int = 0, temperature: float = 1.0) -> np.ndarray:
        """What n draws of the prior are made of, float32 [n,P], or [n,P+1] where each chooses a component besides.

        P is the prior's ``noise_dim``, or L. Raises as ``sample_latents`` does.
        """
        self.require("sample")
        _check_count("n", n, 1)
        if not 0 <= temperature <= MAX_TEMPERATURE:
            raise InvalidInput(f"temperature is {temperature}, expected a number from 0 to {MAX_TEMPERATURE}")
        return self._prior_noise(n, _checked_seed(seed), temperature)

    def _prior_noise(self, n: int, seed: int, temperature: float) -> np.ndarray:
        prior = self.manifest.prior
        drawn = noise.prior_noise(seed, n, prior.noise_dim or self._latent_dim) * np.float32(temperature)
        return np.column_stack([drawn, noise.prior_choice(seed, n)]) if prior.choice else drawn

    def latents_of(self, drawn: np.ndarray) -> np.ndarray:
        """The latents z, float32 [n,L], of rows of ``prior_noise``, each of its own row alone."""
        if self._prior is None:
            return self._latents(drawn)
        if not self.manifest.prior.choice:
            return self._prior.run({"noise": drawn})["z"]
        noise_, choice = np.ascontiguousarray(drawn[:, :-1]), np.ascontiguousarray(drawn[:, -1])
        return self._prior.run({"noise": noise_, "choice": choice})["z"]

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

    def score(
        self,
        x: np.ndarray,
        definition: ScoreDefinition | None = None,
        maps: bool = False,
        also: Mapping[str, ScoreDefinition] | None = None,
        map_kind: MapKind | None = None,
        latents: bool = False,
    ) -> Scores:
        """Scores of x, float32 [N,C,H,W] (images in [0, 1]), by ``definition`` or the bundle's default one.

        ``maps``: also a map of each row, of ``map_kind`` or of what ``default_map`` is. ``latents``: also what each
        latent dimension adds to the rate.

        ``also``: further definitions, whose scores are in the answer's ``also``; all share the forward passes. A
        ``definition`` or one of ``also`` that was fitted must be the manifest's own.

        Raises InvalidInput, UnsupportedVerb for an estimator or a map that the model does not have, and
        BundleGraphError where the model itself yields NaN.
        """
        main = definition or self.manifest.scores[self.manifest.default_score]
        wanted = [main, *(also or {}).values()]
        for each in wanted:
            self.require(f"score.{each.estimator}")
        kind = map_kind or self.default_map
        if maps:
            self.require_map(kind)
        if latents:
            self.require("score.top_latents")
        x = self.features(x)
        rows = min(self._rows, max(1, MAX_ELEMENTS // (self._chunk(max(each.k for each in wanted)) * self._dimensions)))
        shown = kind if maps else None
        parts = [self._score(x[i : i + rows], main, wanted, shown, latents) for i in range(0, len(x), rows)]
        together = {name: np.concatenate([getattr(part, name) for part in parts]) for name in Scores._fields[:-4]}
        others = zip(*(part.also.values() for part in parts), strict=True)
        return Scores(
            **together,
            k=main.k,
            map=np.concatenate([cast(np.ndarray, part.map) for part in parts]) if maps else None,
            latents=np.concatenate([cast(np.ndarray, part.latents) for part in parts]) if latents else None,
            also=dict(zip(also or {}, map(np.concatenate, others), strict=True)),
        )

    def measure(self, x: np.ndarray, k: int, seed: int, stretch: bool = False) -> Measured:
        """What service.scores.detectors look at, of x, float32 [N,C,H,W] of images in [0, 1], at the seed's k samples.

        Holds some five arrays of x's size: x in batches. ``stretch``: of the contrast-stretched images. Raises
        InvalidInput.
        """
        x = self.features(x)
        return self._measure(stretched(x) if stretch else x, k, seed, True, True)

    def corruption(self, x: np.ndarray) -> np.ndarray:
        """The score ``corruption`` of x, float32 [N,C,H,W] of images in [0, 1]: float64 [N], nats
        (service.scores.corruption).

        Raises as ``log_odds``.
        """
        return corruption_scores(self.log_odds(x))

    def log_odds(self, x: np.ndarray) -> np.ndarray:
        """Log odds in nats that a place was painted over, float32 [N,H,W], of x as ``corruption`` takes them.

        Raises InvalidInput, UnsupportedVerb without such a graph, and BundleGraphError for log odds that are not
        finite: of pixels in [0, 1] no sound graph gives such.
        """
        self.require("score.corruption")
        return self._log_odds(self._checked(x))

    def _log_odds(self, x: np.ndarray) -> np.ndarray:
        assert self._corruption is not None
        log_odds = self._corruption.run({"x": x})["log_odds"]
        finite = np.isfinite(log_odds).all(axis=(1, 2))
        if not finite.all():
            row = int(np.argmin(finite))
            raise BundleGraphError(f"the model's corruption is {_first_odd(log_odds[row])} for row {row}")
        return log_odds

    @cached_property
    def _marginals(self) -> Marginals | None:
        """Of the prior by latent dimension; None of N(0, I). Drawn when first asked for."""
        return (
            None if is_standard_normal(self.manifest) else Marginals(self.latents_of(self._prior_noise(DRAWS, 0, 1.0)))
        )

    @property
    def default_map(self) -> MapKind:
        """The kind of map that is given where none is asked for: ``anomaly`` if the bundle has it."""
        return "distortion" if self.anomaly_map is None else "anomaly"

    def sight(self, x: np.ndarray) -> Sight:
        """What service.scores.maps.anomaly_map looks at: rows as ``score`` takes them, in batches. Raises
        InvalidInput."""
        return self._sight(self.features(x))

    def _sight(self, x: np.ndarray) -> Sight:
        encoded = next(self._encode(x, 1, 0))
        return Sight(x, *self._at_loc(encoded["target"], encoded["loc"]))

    def _at_loc(self, target: np.ndarray, loc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """E[x|loc] and −log p(x|loc) by place, float32 [n,C,H,W] both."""
        decoded = self._decoder.run({"z": loc})
        return decoded["mean"], -self._densities(target, loc[:, None], decoded)[2][:, 0]

    def _score(
        self,
        x: np.ndarray,
        main: ScoreDefinition,
        wanted: Sequence[ScoreDefinition],
        shown: MapKind | None,
        latents: bool,
    ) -> Scores:
        """The scores of a few rows, and the map that is to be shown."""
        maps = shown == "distortion"
        fitted = any(each.estimator in FITTED for each in wanted)
        passes = Passes(
            lambda x, k, seed, places: self._measure(x, k, seed, fitted, places),
            x,
            wanted,
            maps,
            self._log_odds,
        )
        every = Estimates(passes, self.manifest.scores, self.detectors, self.anomaly_map)
        scores = [every.score(each) for each in wanted]
        measured = passes.of(main)
        manifest, unknown = self.manifest, np.full(len(x), np.nan)
        has_bound, is_point = manifest.evidence != "none", manifest.posterior.moments == "point"
        return Scores(
            score=scores[0],
            elbo=estimators.mean(measured.log_w) if has_bound else unknown,
            log_likelihood=estimators.log_mean_exp(measured.log_w) if has_bound else unknown,
            rate=(measured.log_q - measured.log_p_z).mean(axis=1) if has_bound and not is_point else unknown,
            distortion=-measured.log_p_x.mean(axis=1) if manifest.tells_distortion else unknown,
            bits_per_dim=self._bits_per_dim(-scores[0], main),
            standard_error=every.standard_error(main),
            k=main.k,
            map=self._map(passes, measured, shown),
            latents=divergences(measured.loc, measured.scale, self._marginals) if latents else None,
            also={str(index): values for index, values in enumerate(scores[1:])},
        )

    def _map(self, passes: Passes, measured: Measured, shown: MapKind | None) -> np.ndarray | None:
        if shown == "corruption":
            return passes.log_odds()
        if shown == "anomaly" and self.anomaly_map is not None:
            return self.anomaly_map.values(self._sight(measured.x))
        if shown is None:
            return None
        return np.stack([row.sum(axis=0) for row in measured.distortion]).astype(np.float32)

    def _bits_per_dim(self, bound: np.ndarray, definition: ScoreDefinition) -> np.ndarray:
        measure = self.manifest.likelihood.measure
        of_levels = measure == "counting" or (measure == "lebesgue" and self.manifest.modelled.kind == "image")
        if definition.estimator not in ("elbo", "iwae") or not of_levels:
            return np.full(len(bound), np.nan)
        return estimators.bits_per_dim(bound, self._dimensions, measure)

    def run_graph(self, role: Graph, feeds: Arrays) -> Arrays:
        """One graph's outputs for all rows of ``feeds`` in a single run: for verification."""
        session = self._sessions[role]
        if role == "backbone" and self._backbone is not None:
            return self._backbone.run_at_once(feeds)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))

    def _measure(self, x: np.ndarray, k: int, seed: int, mean: bool, places: bool) -> Measured:
        """A few rows at the seed's k samples; what is at loc (``mean``) and the distortion by place only if asked, else
        empty."""
        distortion = np.zeros(x.shape if places else (len(x), 0))
        parts: list[tuple[np.ndarray, ...]] = []
        loc = scale = target = np.empty(0)
        for encoded in self._encode(x, k, seed):
            log_p_x, log_p_z, log_p_x_map = self._densities(encoded["target"], encoded["z"], places=places)
            parts.append((log_p_x, log_p_z, encoded["log_q"]))
            loc, scale, target = encoded["loc"], encoded["scale"], encoded["target"]
            if places:
                distortion -= np.stack([row.sum(axis=0, dtype=np.float64) for row in log_p_x_map])
        log_p_x, log_p_z, log_q = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        nothing = np.empty((len(x), 0), np.float32)
        decoded, at_loc = self._at_loc(target, loc) if mean else (nothing, nothing)
        return Measured(x, decoded, loc, scale, log_p_x, log_p_z, log_q, distortion / k, at_loc)

    def _densities(
        self, target: np.ndarray, z: np.ndarray, decoded: Arrays | None = None, places: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log p(x|z) and log p(z), float64 [n,k], and log p(x|z) by ``places``, float32 [n,k,C,H,W], if wanted.

        ``decoded``: the decoder's outputs for z, where these are known.
        """
        n, k, latent_dim = z.shape
        wanted = ["log_p_x", "log_p_z", *(["log_p_x_map"] if places else [])]
        if decoded is None:
            decoded = self._decoder.run({"z": z.reshape(n * k, latent_dim)}, outputs=self._parameters)
        parameters = {name: decoded[name] for name in self._parameters}
        if self._density.sizes == (1,):
            parameters = {name: value.reshape(n, k, *self._shape) for name, value in parameters.items()}
            outputs = self._density_by_x.run({"target": target, "z": z, **parameters}, outputs=wanted)
        else:
            feeds = {"target": _repeated(target, k), "z": z.reshape(n * k, 1, latent_dim)}
            feeds |= {name: value[:, None] for name, value in parameters.items()}
            outputs = self._density.run(feeds, outputs=wanted)
        log_p_x_map = outputs["log_p_x_map"].reshape(n, k, *self._shape) if places else np.empty((n, k, 0), np.float32)
        return outputs["log_p_x"].reshape(n, k), outputs["log_p_z"].reshape(n, k), log_p_x_map

    def _encode(self, x: np.ndarray, k: int, seed: int, outputs: Sequence[str] | None = None) -> Iterator[Arrays]:
        """The encoder's ``outputs`` for x, all by default, a chunk of the seed's k samples at a time."""
        same = {"dither": noise.dither(seed, self._shape)} if self.manifest.signature.dither else {}
        start = 0
        while start < k:
            chunk = self._chunk(k - start)
            drawn = min(chunk, k - start)
            same["noise"] = noise.posterior_chunk(seed, k, self._noise_dim, start, chunk)
            encoded = self._encoder(chunk).run({"x": x}, same, outputs)
            yield encoded | {name: encoded[name][:, :drawn] for name in ("z", "log_q") if name in encoded}
            start += chunk

    def _chunk(self, samples: int) -> int:
        """How many of so many samples a row go through the graphs next, some of them padding."""
        return next((size for size in self._chunks if size >= samples), self._chunks[-1])

    def _runner(
        self, role: Graph, trial_rows: Callable[[int], Arrays], sizes: tuple[int, ...] | None = None
    ) -> BatchInvariantRunner:
        """The graph's runner."""
        session, vectors = self._sessions[role], role in self._serial
        return BatchInvariantRunner(session, trial_rows, sizes, vectors, self.runtime.row_threads, self.runtime.memory)

    def _encoder(self, chunk: int) -> BatchInvariantRunner:
        """The runner for so many samples a row: few sizes, since each is tried for row independence."""
        if (known := self._encoders.get(chunk)) is not None:
            return known
        with self._lock:
            if chunk not in self._encoders:
                shapes: dict[str, tuple[int, ...]] = {"x": self._shape, "noise": (chunk, self._noise_dim)}
                if self.manifest.signature.dither:
                    shapes["dither"] = self._shape
                draw = random_rows(shapes, frozenset({"x", "dither"}))
                self._encoders[chunk] = self._runner("encoder", lambda count: draw(count) | {"x": self._typical(count)})
            return self._encoders[chunk]

    def _density_rows(self, count: int) -> Arrays:
        """Inputs of the density graph at one sample each of typical rows, for trials."""
        encoded = next(self._encode(self._typical(count), 1, 0))
        decoded = self._decoder.run({"z": encoded["z"][:, 0]})
        return {"target": encoded["target"], "z": encoded["z"]} | {
            name: decoded[name][:, None] for name in self._parameters
        }

    def _prior_rows(self, count: int) -> Arrays:
        """Inputs of the prior graph, for trials."""
        shapes: dict[str, tuple[int, ...]] = {"noise": (self.manifest.prior.noise_dim or 0,)}
        if self.manifest.prior.choice:
            shapes["choice"] = ()
        return random_rows(shapes, frozenset({"choice"}))(count)

    def _typical(self, count: int) -> np.ndarray:
        """Rows for trials, all different, float32 [count,C,H,W]: random pixels, or mixtures of the reference's rows.

        Other numbers than pixels are in units of their own: far from the data a network's units may all be saturated,
        and tell nothing of how it rounds.
        """
        random = np.random.RandomState(0)
        if self.manifest.modelled.kind == "image":
            return random.random_sample((count, *self._shape)).astype(np.float32)
        known = self.bundle.arrays(REFERENCE)["x"]
        a, b = (known[random.randint(len(known), size=count)] for _ in range(2))
        t = random.random_sample((count, 1, 1, 1))
        return ((a + t * (b - a)) * (1 + 0.01 * random.standard_normal(a.shape))).astype(np.float32)

    def _checked(self, x: np.ndarray) -> np.ndarray:
        """x as float32 [N,C,H,W], after its type, shape and range were checked; of 8-bit levels their pixels."""
        is_image = self._backbone is not None or self.manifest.modelled.kind == "image"
        are_levels = is_image and isinstance(x, np.ndarray) and x.dtype == np.uint8
        x = x if are_levels else _floats("x", x)
        shape = self._shape if self._backbone is None else self._backbone.image
        if x.ndim != 4 or x.shape[1:] != shape or len(x) == 0:
            raise InvalidInput(f"x has shape {x.shape}, expected (N, {', '.join(map(str, shape))}) with N ≥ 1")
        if are_levels:
            return unit_levels(x)
        low, high = x.min(), x.max()  # NaN, if there is one
        if not (low >= 0.0 and high <= 1.0 if is_image else np.isfinite(low) and np.isfinite(high)):
            raise InvalidInput(_first_fault(x, is_image))
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


def _repeated(rows: np.ndarray, times: int) -> np.ndarray:
    """Each row so many times, aligned: batches of them need not be copied."""
    found = aligned_empty((len(rows) * times, *rows.shape[1:]), rows.dtype)
    found.reshape(len(rows), times, *rows.shape[1:])[:] = rows[:, None]
    return found


def _first_fault(x: np.ndarray, is_image: bool) -> str:
    """What is wrong with the first row of x that is no row of numbers, or of pixels."""
    for index, row in enumerate(x):
        low, high = row.min(), row.max()
        if is_image and not (low >= 0.0 and high <= 1.0):
            return f"x, row {index}: pixels span {low} to {high}, expected finite numbers in [0, 1]"
        if not (np.isfinite(low) and np.isfinite(high)):
            return f"x, row {index}: expected finite float32 numbers"
    raise AssertionError("called for rows with a fault")


def _first_odd(values: np.ndarray) -> float:
    """The first of them that is NaN or infinite."""
    return float(values[~np.isfinite(values)][0])


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

"""Model: one bundle, loaded, warmed up, and answering the verbs on arrays."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np

from service.bundle.capabilities import refusals
from service.bundle.files import Bundle
from service.bundle.manifest import Graph, ScoreDefinition
from service.errors import InvalidInput, UnsupportedVerb
from service.inference import noise
from service.inference.batch_invariance import Arrays, random_rows
from service.inference.cost import MIN_SAMPLES, Cost, timed
from service.inference.model.graph_runners import GraphRunners
from service.inference.model.latents import draw_prior_noise, path_between
from service.inference.model.maps import NO_ANOMALY_MAP, map_inputs
from service.inference.model.scoring import Scorer, Scores
from service.inference.model.validation import (
    check_count,
    check_temperature,
    checked_latents,
    checked_rows,
    checked_seed,
)
from service.inference.sessions import Runtime
from service.inference.sharing import share
from service.scores.corruption import corruption_scores
from service.scores.detectors import detector_arrays, load_detectors, stretched
from service.scores.forward_pass import ForwardPass
from service.scores.maps.anomaly_map import AnomalyMap, MapInputs, MapKind, load_map


class Encoding(NamedTuple):
    """q(z|x) of N rows: ``loc``, ``scale`` [N,L] and S seeded draws ``samples`` [N,S,L]; float32.

    The manifest's ``posterior`` says what loc and scale mean.
    """

    loc: np.ndarray
    scale: np.ndarray
    samples: np.ndarray


class Model:
    """A bundle in memory. Made by ``Model.load``; safe to call from several threads.

    ``bundle``, ``manifest`` and ``digest`` tell what was loaded, ``runtime`` on what, ``nodes`` how many operators each
    graph has, ``refused`` which verbs the model cannot answer and why (service.bundle.capabilities). ``detectors``: the
    fitted scores, by name; ``anomaly_map``: the fitted map, or None. ``cost``: what its rows were measured to take.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, runners: GraphRunners) -> None:
        self.bundle, self.manifest, self.digest, self.runtime = bundle, bundle.manifest, bundle.digest, runtime
        self.refused = refusals(self.manifest)
        fitted = detector_arrays(bundle)
        self.detectors = load_detectors(self.manifest, fitted)
        self.anomaly_map: AnomalyMap | None = load_map(self.manifest, fitted)
        if self.anomaly_map is None:
            self.refused.setdefault("score.map.anomaly", NO_ANOMALY_MAP)
        self.nodes, self.cost = runners.nodes, Cost()
        self._runners, self._backbone = runners, runners.backbone
        self._scorer = Scorer(self.manifest, runners, self.detectors, self.anomaly_map)
        self._latent_dim = self.manifest.signature.latent_dim

    @classmethod
    def load(cls, bundle: Bundle, runtime: Runtime) -> Model:
        """Check the bundle's graphs and start a session for each.

        Raises BundleGraphError (operators, external data, another signature), BundleIntegrityError (a file changed
        since open_bundle), BundleFormatError (fitted arrays that are not the manifest's), DeviceUnavailable.
        """
        return cls(bundle, runtime, GraphRunners.load(bundle, runtime))

    @property
    def batch_sizes(self) -> dict[str, tuple[int, ...]]:
        """The batch sizes in use by graph, as far as runners were made (a fact to log); of the encoder by samples."""
        return self._runners.batch_sizes

    def warm_up(self, pool: Executor | None = None) -> None:
        """Run every graph once, with the default score and one sample, so that no request pays for first uses.

        Idle threads of ``pool`` take a part of it. Then the model's cost is measured.
        """
        x, behind = self._runners.typical_rows(1), self.without_backbone()
        tasks: list[Callable[[], object]] = [lambda: behind.score(x)]
        if self._backbone is not None:
            image = self._backbone.image
            tasks.append(lambda: self.features(random_rows({"x": image}, frozenset({"x"}))(1)["x"]))
        if "decode" not in self.refused:
            tasks.append(lambda: self._warm_up_decoding(behind.encode(x).loc))
        else:
            tasks.append(lambda: behind.encode(x))
        if "corruption" in self.manifest.graphs:
            tasks.append(lambda: self.corruption(x))
        share(tasks, pool)
        if self._backbone is not None:
            self.cost.row = timed(tasks[1])
        samples = self._runners.distinct_samples(MIN_SAMPLES)
        self.cost.learn(MIN_SAMPLES, timed(lambda: behind.forward_pass(x, samples, 0)) * MIN_SAMPLES / samples)

    def _warm_up_decoding(self, latents: np.ndarray) -> None:
        """Run the graphs of the prior, the decoder and the observation once, as far as the bundle has them."""
        if "prior" in self.manifest.graphs:
            self.sample_latents(1)
        if "observation" in self.manifest.graphs:
            self.observe(latents)
        else:
            self.decode(latents)

    def require(self, verb: str) -> None:
        """Raise UnsupportedVerb, with the reason, if ``verb`` is among ``refused``."""
        if verb in self.refused:
            raise UnsupportedVerb(f"{self.manifest.name} does not answer {verb}: {self.refused[verb]}")

    def require_map(self, kind: MapKind) -> None:
        """Raise UnsupportedVerb, with the reason, if the model has no maps of that kind.

        Log odds need no log p(x) that comes apart into places.
        """
        for verb in (["score.map"] if kind != "corruption" else []) + [f"score.map.{kind}"]:
            self.require(verb)

    def features(self, x: np.ndarray) -> np.ndarray:
        """Rows of the other graphs: float32 [N, *signature.shape], the backbone's features of x, or x itself.

        Raises InvalidInput, also for a row whose features are not finite.
        """
        x = self._checked(x)
        return x if self._backbone is None else self._backbone.run(x)

    def without_backbone(self) -> Model:
        """Return the same model without its backbone: its rows x are ``features``. The model itself if it has none."""
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
        check_count("samples", samples, 0)
        if samples:
            self.require("encode.samples")
        seed = checked_seed(seed)
        if not samples:  # the target, which is as large as x, does not leave the graph
            encoded = next(self._runners.encode(x, 1, seed, ("loc", "scale")))
            return Encoding(encoded["loc"], encoded["scale"], np.empty((len(x), 0, self._latent_dim), np.float32))
        chunks = list(self._runners.encode(x, samples, seed, ("loc", "scale", "z")))
        draws = np.concatenate([chunk["z"] for chunk in chunks], axis=1)
        return Encoding(chunks[0]["loc"], chunks[0]["scale"], draws)

    def decode(self, z: np.ndarray) -> np.ndarray:
        """E[x|z], float32 [M,C,H,W], of latents z, float32 [M,L]. Raises InvalidInput, UnsupportedVerb."""
        self.require("decode")
        return self._runners.decode(checked_latents(z, self._latent_dim))["mean"]

    def observe(self, z: np.ndarray, seed: int | Sequence[int] = 0) -> np.ndarray:
        """A draw x ~ p(x|z), float32 [M,C,H,W], for each latent of z, float32 [M,L].

        One seed gives every row the same noise (so that rows are independent of their neighbours); for draws that are
        independent of each other give a seed a row. Raises InvalidInput, and UnsupportedVerb without such a graph.
        """
        self.require("decode.draw")
        z = checked_latents(z, self._latent_dim)
        seeds = [seed] * len(z) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(z):
            raise InvalidInput(f"{len(seeds)} seeds for {len(z)} latents; expected one, or one each")
        seeds, distribution = [checked_seed(number) for number in seeds], self.manifest.likelihood.observation_noise
        if distribution == "none":
            return self._runners.observe(z, None)
        shape = self.manifest.signature.shape
        draws = [noise.observation_noise(number, shape, distribution) for number in seeds]
        return self._runners.observe(z, np.stack(draws))

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
        """The noise of n draws of the prior, float32 [n,P], or [n,P+1] where each draw chooses a component besides.

        P is the prior's ``noise_dim``, or L. Raises as ``sample_latents`` does.
        """
        self.require("sample")
        check_count("n", n, 1)
        check_temperature(temperature)
        return draw_prior_noise(self.manifest, n, checked_seed(seed), temperature)

    def latents_of(self, prior_noise: np.ndarray) -> np.ndarray:
        """The latents z, float32 [n,L], that rows of ``prior_noise`` give, each of its own row alone.

        Raises InvalidInput where the noise itself are the latents, and is not finite float32 [n,L].
        """
        if "prior" not in self.manifest.graphs:
            return checked_latents(prior_noise, self._latent_dim)
        return self._runners.draw_prior(prior_noise)

    def interpolate(self, a: np.ndarray, b: np.ndarray, steps: int, mode: str = "lerp") -> np.ndarray:
        """Latents from a to b, both [L], ends included: float32 [steps,L].

        ``lerp`` goes straight, ``slerp`` along the great circle (Shoemake 1985), keeping the norm that a Gaussian prior
        expects. Raises InvalidInput; also for slerp between opposite latents, which no single great circle joins.
        """
        check_count("steps", steps, 2)
        start, stop = (checked_latents(np.asarray(end)[None], self._latent_dim)[0] for end in (a, b))
        return path_between(start, stop, steps, mode)

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
        main, further = definition or self.manifest.scores[self.manifest.default_score], also or {}
        for needed in (main, *further.values()):
            self.require(f"score.{needed.estimator}")
        kind = map_kind or self.default_map
        if maps:
            self.require_map(kind)
        if latents:
            self.require("score.top_latents")
        rows, started = self.features(x), time.thread_time()
        scores = self._scorer.score(rows, main, further, kind if maps else None, latents)
        self.cost.learn(len(x) * self._runners.distinct_samples(main.k), time.thread_time() - started)
        return scores

    def estimated_seconds(self, rows: int, samples: int) -> float:
        """Estimate the seconds of scoring so many rows with so many samples each, which may be copies of one."""
        return self.cost.estimate(rows, self._runners.distinct_samples(samples))

    def forward_pass(self, x: np.ndarray, k: int, seed: int, stretch: bool = False) -> ForwardPass:
        """Run one forward pass of x, float32 [N,C,H,W] (images in [0, 1]), at the seed's k samples.

        ``stretch``: of the contrast-stretched images. A pass holds some five arrays of x's size: give x in batches.
        Raises InvalidInput.
        """
        x = self.features(x)
        return self._scorer.forward_pass(stretched(x) if stretch else x, k, seed, True, True)

    def corruption(self, x: np.ndarray) -> np.ndarray:
        """The score ``corruption`` of images x, float32 [N,C,H,W] in [0, 1]: float64 [N], nats.

        It is defined by service.scores.corruption. Raises as ``log_odds``.
        """
        return corruption_scores(self.log_odds(x))

    def log_odds(self, x: np.ndarray) -> np.ndarray:
        """Log odds in nats that a place was painted over, float32 [N,H,W], of images x, float32 [N,C,H,W] in [0, 1].

        Raises InvalidInput, UnsupportedVerb without such a graph, and BundleGraphError for log odds that are not
        finite: of pixels in [0, 1] no sound graph gives such.
        """
        self.require("score.corruption")
        return self._runners.log_odds(self._checked(x))

    @property
    def default_map(self) -> MapKind:
        """The kind of map that is given where none is asked for: ``anomaly`` if the bundle has it."""
        return "distortion" if self.anomaly_map is None else "anomaly"

    def map_inputs(self, x: np.ndarray) -> MapInputs:
        """Compute the inputs of an anomaly map for rows as ``score`` takes them. Raises InvalidInput."""
        return map_inputs(self._runners, self.features(x))

    def run_graph(self, role: Graph, feeds: Arrays) -> Arrays:
        """One graph's outputs for all rows of ``feeds`` in a single run: for verification."""
        return self._runners.run_at_once(role, feeds)

    def _checked(self, x: np.ndarray) -> np.ndarray:
        """Check rows x as they come in, images where there is a backbone: float32 [N,C,H,W]. Raises InvalidInput."""
        shape = self.manifest.signature.shape if self._backbone is None else self._backbone.image
        are_images = self._backbone is not None or self.manifest.modelled.kind == "image"
        return checked_rows(x, shape, are_images)

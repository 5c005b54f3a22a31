"""Raw ONNX Runtime: each verb's graphs on arrays that lie ready, one after the other, and nothing else.

The sessions have ONNX Runtime's default options (its threads spin, which the service's do not), a batch goes through in
one run whatever its size, no output is checked, and nobody keeps rows bitwise independent of their batch. On a GPU the
provider has the service's options (TF32 would be another computation), and what goes from graph to graph crosses twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnxruntime as ort

from service.bundle.files import Bundle
from service.bundle.manifest import FITTED, REFERENCE, Graph, Manifest, ScoreDefinition
from service.errors import DeviceUnavailable
from service.inference.sessions import CPU, CUDA, providers_of
from service.scores.detectors import is_stretched

Work = Callable[[], object]
BOUND = "bound "


def bound(k: int) -> str:
    """Name of the verb that computes the bound from k samples, and no other score."""
    return f"{BOUND}{k}"


def reference_pixels(bundle: Bundle, batch: int) -> np.ndarray:
    """``batch`` of the bundle's own reference images, uint8 [N,C,H,W]: such as it was made for."""
    pixels = np.rint(bundle.arrays(REFERENCE)["x"] * 255).astype(np.uint8)
    return pixels[np.arange(batch) % len(pixels)]


def to_unit(pixels: np.ndarray) -> np.ndarray:
    """Float32 in [0, 1] of uint8."""
    return (pixels / np.float32(255)).astype(np.float32)


class RawModel:
    """The sessions of one bundle with so many threads each, and the verbs on ``x`` float32 [N,C,H,W] in [0, 1].

    ``device``: cpu or cuda. Raises DeviceUnavailable where ONNX Runtime took another.
    """

    def __init__(self, bundle: Bundle, threads: int, device: str = "cpu") -> None:
        provider = CUDA if device == "cuda" else CPU
        if provider == CUDA:
            ort.preload_dlls()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        roles: tuple[Graph, ...] = ("encoder", "decoder", "joint", "prior", "corruption")
        self._manifest = bundle.manifest
        self._sessions = {
            role: ort.InferenceSession(bundle.graph(role), options, providers=providers_of(provider))
            for role in roles
            if role in bundle.manifest.graphs
        }
        taken = {session.get_providers()[0] for session in self._sessions.values()}
        if taken != {provider}:
            raise DeviceUnavailable(f"{provider} was asked for, ONNX Runtime took {', '.join(sorted(taken))}")

    def verb(self, name: str, x: np.ndarray) -> Work:
        """The verb as a function of nothing, its inputs made beforehand.

        Of ``sample`` as many draws as x has rows, of ``interpolate`` as many images from the first of x to the second.
        """
        if name.startswith(BOUND):
            return self._pass(x, int(name.removeprefix(BOUND)), at_loc=False)
        verbs = {
            "encode": self._encode,
            "decode": self._decode,
            "reconstruct": self._reconstruct,
            "score": self._score,
            "interpolate": self._interpolate,
            "sample": self._sample,
        }
        return verbs[name](x)

    def _inputs(self, x: np.ndarray, k: int) -> dict[str, np.ndarray]:
        """The encoder's inputs with k samples an image."""
        random, signature = np.random.RandomState(0), self._manifest.signature
        feeds = {"x": x}
        if signature.noise_dim:
            feeds["noise"] = random.standard_normal((len(x), k, signature.noise_dim)).astype(np.float32)
        if signature.dither:
            feeds["dither"] = random.random_sample(x.shape).astype(np.float32)
        return feeds

    def _encode(self, x: np.ndarray) -> Work:
        encoder, feeds = self._sessions["encoder"], self._inputs(x, 1)
        return lambda: encoder.run(["loc", "scale"], feeds)

    def _decode(self, x: np.ndarray) -> Work:
        latents = np.random.RandomState(0).standard_normal((len(x), self._manifest.signature.latent_dim))
        decoder, feeds = self._sessions["decoder"], {"z": latents.astype(np.float32)}
        return lambda: decoder.run(["mean"], feeds)

    def _reconstruct(self, x: np.ndarray) -> Work:
        encoder, decoder, feeds = self._sessions["encoder"], self._sessions["decoder"], self._inputs(x, 1)
        return lambda: decoder.run(["mean"], {"z": encoder.run(["loc"], feeds)[0]})

    def _interpolate(self, x: np.ndarray) -> Work:
        encode, decode = self._encode(x[:2]), self._decode(x)
        return lambda: (encode(), decode())

    def _sample(self, x: np.ndarray) -> Work:
        prior, decode = self._sessions.get("prior"), self._decode(x)
        if prior is None:
            return decode
        decoder, random, rule = self._sessions["decoder"], np.random.RandomState(0), self._manifest.prior
        feeds = {"noise": random.standard_normal((len(x), rule.noise_dim or 0)).astype(np.float32)}
        if rule.choice:
            feeds["choice"] = random.random_sample(len(x)).astype(np.float32)
        return lambda: decoder.run(["mean"], {"z": prior.run(["z"], feeds)[0]})

    def _score(self, x: np.ndarray) -> Work:
        """The passes that the default score is made of, without the arithmetic on what they give."""
        passes = [self._pass(x, k, at_loc) for k, at_loc in needed_passes(self._manifest)]
        default = self._manifest.scores[self._manifest.default_score]
        if any(part.estimator == "corruption" for part in _parts(self._manifest, default)):
            passes.append(lambda: self._sessions["corruption"].run(["log_odds"], {"x": x}))
        return lambda: [run() for run in passes]

    def _pass(self, x: np.ndarray, k: int, at_loc: bool) -> Work:
        """k posterior samples through encoder, decoder and joint; with ``at_loc`` also loc through the last two."""
        encoder, feeds = self._sessions["encoder"], self._inputs(x, k)
        fit = self._manifest.likelihood.fit_output

        def run() -> object:
            loc, target, z, log_q_z = encoder.run(["loc", "target", "z", "log_q_z"], feeds)
            log_p_x_given_z, log_p_z = self._joint(target, z, [fit, "log_p_z"])
            there = self._joint(target, loc[:, None], [f"{fit}_map"]) if at_loc else []
            return (log_p_x_given_z + log_p_z - log_q_z).mean(axis=1), there

        return run

    def _joint(self, target: np.ndarray, z: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        """Of z [N,K,L]: decoded, and the joint at the target."""
        names, (n, k) = self._manifest.likelihood.parameters, z.shape[:2]
        decoded = self._sessions["decoder"].run(["mean", *names], {"z": z.reshape(n * k, -1)})[1:]
        parameters = {name: value.reshape(n, k, *value.shape[1:]) for name, value in zip(names, decoded, strict=True)}
        found: list[np.ndarray] = self._sessions["joint"].run(outputs, {"target": target, "z": z, **parameters})
        return found


def needed_passes(manifest: Manifest) -> list[tuple[int, bool]]:
    """(k, whether also at loc) of each pass of the default score: one a seed, and another of the contrast-stretched
    images where a part looks at these (service.scores.evaluation)."""
    longest: dict[tuple[int, bool], int] = {}
    parts = list(_parts(manifest, manifest.scores[manifest.default_score]))
    for part in parts:
        key = (part.seed, is_stretched(part))
        longest[key] = max(part.k, longest.get(key, 0))
    fitted = any(part.estimator in FITTED for part in parts)
    return [(k, fitted) for k in longest.values()]


def _parts(manifest: Manifest, definition: ScoreDefinition) -> Iterator[ScoreDefinition]:
    """The definition, or those that it combines."""
    if definition.estimator != "combination":
        yield definition
    for name in definition.of:
        yield from _parts(manifest, manifest.scores[name])

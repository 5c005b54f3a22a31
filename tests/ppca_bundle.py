"""A real bundle without torch: probabilistic PCA, fitted in closed form (Tipping & Bishop 1999).

x = W z + μ + σ ε. With the maximum-likelihood W the posterior is exact, so log p(x,z) − log q(z|x) = log p(x) for every
z: the served score must equal ``Ppca.log_likelihood`` whatever the seed, k and estimator. W is rotated at random, which
leaves the likelihood alone and gives the posterior a full covariance.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from service.bundle.files import write_bundle

LOG_2PI = float(np.log(2 * np.pi))
SHAPE, LATENT_DIM = (1, 8, 8), 5
SCORES = {
    "elbo": {"estimator": "elbo", "k": 4, "seed": 0, "description": "negative ELBO of 4 samples"},
    "iwae": {"estimator": "iwae", "k": 16, "seed": 1, "description": "negative IWAE-16 bound"},
}


@dataclass(frozen=True)
class Ppca:
    """Parameters in float64: ``weight`` [D,L], ``mean`` [D], ``sigma``; images are ``shape``."""

    weight: np.ndarray
    mean: np.ndarray
    sigma: float
    shape: tuple[int, int, int]

    @property
    def latent_dim(self) -> int:
        return self.weight.shape[1]

    def log_likelihood(self, x: np.ndarray) -> np.ndarray:
        """log N(x; μ, W Wᵀ + σ² I) of images [N,C,H,W], by Cholesky: float64 [N]."""
        d = len(self.mean)
        cholesky = np.linalg.cholesky(self.weight @ self.weight.T + self.sigma**2 * np.eye(d))
        whitened = np.linalg.solve(cholesky, (x.reshape(len(x), d).astype(np.float64) - self.mean).T)
        return -0.5 * (whitened**2).sum(axis=0) - np.log(np.diag(cholesky)).sum() - 0.5 * d * LOG_2PI

    def posterior(self) -> tuple[np.ndarray, np.ndarray]:
        """(A, R) with q(z|x) = N(A (x − μ), R Rᵀ), R lower triangular: [L,D] and [L,L] (Tipping & Bishop, eq. 7)."""
        precision = self.weight.T @ self.weight + self.sigma**2 * np.eye(self.latent_dim)
        inverse = np.linalg.inv(precision)
        return inverse @ self.weight.T, np.linalg.cholesky(self.sigma**2 * inverse)


def fit_ppca(images: np.ndarray, latent_dim: int, seed: int = 0) -> Ppca:
    """The maximum-likelihood fit to images [N,C,H,W], its latent axes rotated at random (eqs. 14 and 15)."""
    x = images.reshape(len(images), -1).astype(np.float64)
    mean = x.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    values, vectors = values[::-1], vectors[:, ::-1]
    variance = values[latent_dim:].mean()
    rotation = np.linalg.qr(np.random.RandomState(seed).standard_normal((latent_dim, latent_dim)))[0]
    weight = vectors[:, :latent_dim] * np.sqrt(values[:latent_dim] - variance) @ rotation
    return Ppca(weight, mean, float(np.sqrt(variance)), images.shape[1:])


def images(n: int, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> np.ndarray:
    """Smooth random pictures, a few waves and a little pixel noise: float32 [n,C,H,W] in [0, 1], as 8-bit levels."""
    random = np.random.RandomState(seed)
    c, h, w = shape
    y, x = np.mgrid[0:h, 0:w] / max(h, w)
    waves = np.stack([np.cos(np.pi * (i * y + j * x)) for i in range(3) for j in range(3)])
    weights = random.standard_normal((n, c, 9)) * 0.12
    noise = random.standard_normal((n, c, h, w)) * 0.05
    pixels = np.clip(0.5 + np.einsum("nci,ihw->nchw", weights, waves) + noise, 0, 1)
    return (np.round(pixels * 255) / 255).astype(np.float32)


def write_ppca_bundle(
    root: Path,
    name: str = "ppca",
    version: str = "1",
    shape: tuple[int, int, int] = SHAPE,
    latent_dim: int = LATENT_DIM,
    calibration_n: int = 199,
    change: Callable[[dict[str, Any], dict[str, bytes]], None] | None = None,
    verify: Callable[[Path], object] | None = None,
    training: np.ndarray | None = None,
) -> tuple[Path, Ppca]:
    """Fit, build and write the bundle root/name/version; ``change`` may damage manifest and files before they are.

    ``training``: what to fit, in place of ``images``.
    """
    ppca = fit_ppca(images(400, shape) if training is None else training, latent_dim)
    calibration = {score: np.sort(-ppca.log_likelihood(images(calibration_n, shape, seed=1))) for score in SCORES}
    files = {f"{role}.onnx": model for role, model in graphs(ppca).items()}
    files["reference.npz"] = npz(reference(ppca))
    files["calibration.npz"] = npz(calibration)
    files["README.md"] = f"# {name}\n\nProbabilistic PCA in closed form: a test fixture.\n".encode()
    manifest = _manifest(name, version, ppca, calibration)
    if change is not None:
        change(manifest, files)
    return write_bundle(root, manifest, files, verify), ppca


def _manifest(name: str, version: str, ppca: Ppca, calibration: dict[str, np.ndarray]) -> dict[str, Any]:
    channels, height, width = ppca.shape
    quantiles = {
        score: {q: float(np.quantile(values, float(q))) for q in ("0.5", "0.9", "0.99")}
        for score, values in calibration.items()
    }
    outputs = [key for key in reference(ppca) if "." in key]
    return {
        "name": name,
        "version": version,
        "family": "ppca",
        "description": "probabilistic PCA with its exact posterior",
        "preprocessing": {"mode": "L" if channels == 1 else "RGB", "height": height, "width": width},
        "signature": {"shape": list(ppca.shape), "latent_dim": ppca.latent_dim, "noise_dim": ppca.latent_dim},
        "likelihood": {
            "family": "gaussian",
            "parameters": ["loc", "scale"],
            "measure": "lebesgue",
            "observation_noise": "standard_normal",
        },
        "graphs": {role: f"{role}.onnx" for role in ("encoder", "decoder", "joint", "observation")},
        "scores": SCORES,
        "default_score": "elbo",
        "calibration": {"split": "calibration", "n": len(calibration["elbo"]), "quantiles": quantiles},
        "reference": {
            "tolerances": {key: {"atol": 2e-5, "rtol": 1e-6} for key in outputs},
            "max_abs_error": dict.fromkeys(outputs, 0.0),
        },
        "provenance": {"data": {"name": "random waves"}, "seed": 0, "metrics": {"test": {"elbo": 1.0}}},
    }


def reference(ppca: Ppca, n: int = 6, k: int = 3) -> dict[str, np.ndarray]:
    """Inputs, and the outputs as numpy computes them: what reference.npz holds."""
    x = images(n, ppca.shape, seed=2)
    noise = np.random.RandomState(3).standard_normal((n, k, ppca.latent_dim)).astype(np.float32)
    gain, cholesky = ppca.posterior()
    loc = (x.reshape(n, -1) - ppca.mean) @ gain.T
    z = (loc[:, None] + noise @ cholesky.T).astype(np.float32)
    whitened = np.linalg.solve(cholesky, (z - loc[:, None]).reshape(n * k, -1).T).T.reshape(n, k, -1)
    mean = (z.reshape(n * k, -1) @ ppca.weight.T + ppca.mean).reshape(n * k, *ppca.shape).astype(np.float32)
    scale = np.full_like(mean, ppca.sigma)
    deltas = (x[:, None] - mean.reshape(n, k, *ppca.shape).astype(np.float64)) / np.float64(np.float32(ppca.sigma))
    log_p = -0.5 * deltas**2 - np.log(np.float64(np.float32(ppca.sigma))) - 0.5 * LOG_2PI
    observation_noise = np.random.RandomState(4).standard_normal(mean.shape).astype(np.float32)
    log_det = np.log(np.diag(cholesky)).sum()
    return {
        "x": x,
        "noise": noise,
        "observation_noise": observation_noise,
        "encoder.target": x,
        "encoder.loc": loc.astype(np.float32),
        "encoder.scale": np.broadcast_to(np.sqrt((cholesky**2).sum(axis=1)), loc.shape).astype(np.float32),
        "encoder.z": z,
        "encoder.log_q_z": -0.5 * (whitened**2).sum(axis=2) - log_det - 0.5 * ppca.latent_dim * LOG_2PI,
        "decoder.mean": mean,
        "decoder.loc": mean,
        "decoder.scale": scale,
        "joint.log_p_x_given_z": log_p.sum(axis=(2, 3, 4)),
        "joint.log_p_x_given_z_map": log_p.astype(np.float32),
        "joint.log_p_z": (-0.5 * z.astype(np.float64) ** 2 - 0.5 * LOG_2PI).sum(axis=2),
        "observation.sample": mean + scale * observation_noise,
    }


class GraphBuilder:
    """Writes down an ONNX graph: ``add`` appends a node and returns its output's name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def constant(self, value: np.ndarray) -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, operator: str, *inputs: str | np.ndarray, output: str | None = None, **attributes: Any) -> str:
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        output = output or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, names, [output], **attributes))
        return output

    def double(self, value: str) -> str:
        return self.add("Cast", value, to=TensorProto.DOUBLE)

    def single(self, value: str, output: str) -> str:
        return self.add("Cast", value, to=TensorProto.FLOAT, output=output)

    def build(self, inputs: dict[str, list[int | str]], outputs: dict[str, tuple[list[int | str], int]]) -> bytes:
        """The serialised model; inputs are float32, outputs (shape, TensorProto type)."""
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(name, kind, shape) for name, (shape, kind) in outputs.items()],
            self.initializers,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()


def graphs(ppca: Ppca) -> dict[str, bytes]:
    """The four serialised ONNX models by role. They compute in float64 inside, as exported densities do."""
    return {
        "encoder": _encoder(ppca),
        "decoder": _decoder(ppca),
        "joint": _joint(ppca),
        "observation": _observation(ppca),
    }


def _encoder(ppca: Ppca) -> bytes:
    g, image, latent = GraphBuilder(), list(ppca.shape), ppca.latent_dim
    gain, cholesky = ppca.posterior()
    flat = g.add("Reshape", g.double("x"), np.array([-1, len(ppca.mean)]))
    loc = g.add("MatMul", g.add("Sub", flat, ppca.mean), gain.T)
    centre = g.add("Unsqueeze", loc, np.array([1]))
    z = g.single(g.add("Add", centre, g.add("MatMul", g.double("noise"), cholesky.T)), "z")
    # q's density at the z that leaves the graph, in float32: then log w is log p(x) to float64's precision
    whitened = g.add("MatMul", g.add("Sub", g.double(z), centre), np.linalg.inv(cholesky).T)
    squares = g.add("ReduceSum", g.add("Mul", whitened, whitened), np.array([2]), keepdims=0)
    log_norm = np.log(np.diag(cholesky)).sum() + 0.5 * latent * LOG_2PI
    g.add("Sub", g.add("Mul", squares, np.array(-0.5)), np.array(log_norm), output="log_q_z")
    g.add("Identity", "x", output="target")
    g.single(loc, "loc")
    scale = np.sqrt((cholesky**2).sum(axis=1))
    g.single(g.add("Add", g.add("Mul", loc, np.array(0.0)), scale), "scale")
    return g.build(
        {"x": ["N", *image], "noise": ["N", "K", latent]},
        {
            "target": (["N", *image], TensorProto.FLOAT),
            "loc": (["N", latent], TensorProto.FLOAT),
            "scale": (["N", latent], TensorProto.FLOAT),
            "z": (["N", "K", latent], TensorProto.FLOAT),
            "log_q_z": (["N", "K"], TensorProto.DOUBLE),
        },
    )


def _decoder(ppca: Ppca) -> bytes:
    g, image = GraphBuilder(), list(ppca.shape)
    flat = g.add("Add", g.add("MatMul", g.double("z"), ppca.weight.T), ppca.mean)
    mean = g.single(g.add("Reshape", flat, np.array([-1, *image])), "mean")
    g.add("Identity", mean, output="loc")
    g.add("Add", g.add("Mul", mean, np.array(0, np.float32)), np.array(ppca.sigma, np.float32), output="scale")
    outputs = {name: (["M", *image], TensorProto.FLOAT) for name in ("mean", "loc", "scale")}
    return g.build({"z": ["M", ppca.latent_dim]}, outputs)


def _joint(ppca: Ppca) -> bytes:
    g, image = GraphBuilder(), list(ppca.shape)
    scale = g.double("scale")
    target = g.add("Unsqueeze", g.double("target"), np.array([1]))
    deltas = g.add("Div", g.add("Sub", target, g.double("loc")), scale)
    squares = g.add("Mul", g.add("Mul", deltas, deltas), np.array(-0.5))
    log_p = g.add("Sub", g.add("Sub", squares, g.add("Log", scale)), np.array(0.5 * LOG_2PI))
    g.add("ReduceSum", log_p, np.array([2, 3, 4]), keepdims=0, output="log_p_x_given_z")
    g.single(log_p, "log_p_x_given_z_map")
    z = g.double("z")
    log_p_z = g.add("Sub", g.add("Mul", g.add("Mul", z, z), np.array(-0.5)), np.array(0.5 * LOG_2PI))
    g.add("ReduceSum", log_p_z, np.array([2]), keepdims=0, output="log_p_z")
    parameters = {name: ["N", "K", *image] for name in ("loc", "scale")}
    return g.build(
        {"target": ["N", *image], "z": ["N", "K", ppca.latent_dim], **parameters},
        {
            "log_p_x_given_z": (["N", "K"], TensorProto.DOUBLE),
            "log_p_x_given_z_map": (["N", "K", *image], TensorProto.FLOAT),
            "log_p_z": (["N", "K"], TensorProto.DOUBLE),
        },
    )


def _observation(ppca: Ppca) -> bytes:
    g, image = GraphBuilder(), list(ppca.shape)
    g.add("Add", "loc", g.add("Mul", "scale", "noise"), output="sample")
    inputs = {name: ["M", *image] for name in ("loc", "scale", "noise")}
    return g.build(inputs, {"sample": (["M", *image], TensorProto.FLOAT)})


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()

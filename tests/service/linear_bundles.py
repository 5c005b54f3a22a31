"""Real bundles of vectors and signals without torch: linear models, each with a closed form to be judged by.

``table``      vectors with named features in raw units, PPCA with the scaling inside: evidence exact, calibrated
``mixture``    signals, the same with a two-component mixture as its prior, drawn by a graph: evidence is a bound
``pca``        vectors without names, a deterministic encoder and a squared error: no likelihood, no prior
``whitening``  vectors, z = A⁻¹ (x − μ) and back: evidence exact, x and z determine each other
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto

from service.bundle.files import write_bundle
from tests.ppca_bundle import LOG_2PI, GraphBuilder

FEATURES = ["length", "mass, dry", "ratio", "count"]
UNITS = np.array([1.0, 300.0, 0.02, 25.0])
F, D = TensorProto.FLOAT, TensorProto.DOUBLE
K = 3
FIT = "log_p_x_given_z"
Outputs = dict[str, tuple[list[int | str], int]]


@dataclass(frozen=True)
class Linear:
    """x = weight z + mean + scale ε: ``weight`` [D,L], ``mean`` and ``scale`` [D], float64; ``shape`` inside graphs.

    ``components``: weights [J], locs [J,L] and scales [J] of the prior's Gaussians, one standard normal by default.
    """

    weight: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    shape: tuple[int, int, int]
    components: tuple[np.ndarray, np.ndarray, np.ndarray]

    def log_likelihood(self, x: np.ndarray) -> np.ndarray:
        """log p(x) of rows [N,…]: a mixture of N(W m_j + μ, s_j² W Wᵀ + Ψ), float64 [N]."""
        x = x.reshape(len(x), -1).astype(np.float64)
        terms = []
        for share, loc, scale in zip(*self.components, strict=True):
            covariance = scale**2 * self.weight @ self.weight.T + np.diag(self.scale**2)
            terms.append(np.log(share) + log_normal(x - self.mean - self.weight @ loc, covariance))
        return np.logaddexp.reduce(terms, axis=0)

    def posterior(self) -> tuple[np.ndarray, np.ndarray]:
        """(A, R): q(z|x) = N(A (x − μ), R Rᵀ), exact under a standard normal prior."""
        scaled = self.weight / self.scale[:, None] ** 2
        covariance = np.linalg.inv(np.eye(self.weight.shape[1]) + self.weight.T @ scaled)
        return covariance @ scaled.T, np.linalg.cholesky(covariance)

    def log_p_z(self, z: np.ndarray) -> np.ndarray:
        """The prior's density at z [N,L]."""
        terms = [
            np.log(share) + log_normal(z - loc, scale**2 * np.eye(z.shape[1]))
            for share, loc, scale in zip(*self.components, strict=True)
        ]
        return np.logaddexp.reduce(terms, axis=0)


def log_normal(deltas: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """log N(δ; 0, Σ) of rows [N,D]."""
    cholesky = np.linalg.cholesky(covariance)
    whitened = np.linalg.solve(cholesky, deltas.T)
    return -0.5 * (whitened**2).sum(axis=0) - np.log(np.diag(cholesky)).sum() - 0.5 * len(covariance) * LOG_2PI


def linear(
    shape: tuple[int, int, int], latent_dim: int, units: np.ndarray | float = 1.0, mixture: bool = False
) -> Linear:
    """A fixed linear model; ``units`` [D] scale weight, mean and noise alike."""
    random, size = np.random.RandomState(7), int(np.prod(shape))
    components = (np.array([0.3, 0.7]), np.array([[-2.0], [1.0]]) * np.ones(latent_dim), np.array([0.5, 1.0]))
    single = (np.ones(1), np.zeros((1, latent_dim)), np.ones(1))
    return Linear(
        random.standard_normal((size, latent_dim)) * np.reshape(units, (-1, 1)),
        random.uniform(-3, 3, size) * units,
        random.uniform(0.3, 0.6, size) * units,
        shape,
        components if mixture else single,
    )


def draw(model: Linear, n: int, seed: int = 0) -> np.ndarray:
    """Rows x from the model under a standard normal prior, float32 [n,C,H,W]."""
    random = np.random.RandomState(seed)
    z = random.standard_normal((n, model.weight.shape[1]))
    x = z @ model.weight.T + model.mean + model.scale * random.standard_normal((n, len(model.mean)))
    return x.reshape(n, *model.shape).astype(np.float32)


TABLE = linear((1, 1, 4), 2, UNITS)
MIXTURE = linear((2, 1, 6), 3, mixture=True)
PCA = linear((1, 1, 5), 2)
WHITENING = linear((1, 1, 3), 3)


def write_all(root: Path) -> Path:
    """All four bundles, version 1 each, under ``root``."""
    write_table(root)
    write_mixture(root)
    write_pca(root)
    write_whitening(root)
    return root


def write_table(root: Path, **changes: Any) -> Path:
    """The bundle ``table``; ``changes`` replace parts of its manifest."""
    scores = {
        "elbo": {"estimator": "elbo", "k": 4, "seed": 0},
        "iwae": {"estimator": "iwae", "k": 8, "seed": 1},
    }
    inliers = np.sort(-TABLE.log_likelihood(draw(TABLE, 99, seed=1)))
    calibration = {"elbo": inliers, "iwae": inliers}
    manifest = {
        "preprocessing": {"kind": "vector", "natural": [4], "features": FEATURES},
        "evidence": "exact",
        "posterior": {"family": "full_gaussian"},
        "calibration": {"split": "calibration", "n": 99, "quantiles": {"elbo": {}, "iwae": {}}},
        "scores": scores,
        **changes,
    }
    graphs = {
        "encoder": _gaussian_encoder(TABLE),
        "decoder": _decoder(TABLE),
        "joint": _joint(TABLE),
        "observation": _observation(TABLE),
    }
    return _write(root, "table", TABLE, graphs, manifest, {"calibration.npz": _npz(calibration)})


def write_mixture(root: Path, **changes: Any) -> Path:
    """The bundle ``mixture``."""
    manifest = {
        "preprocessing": {"kind": "signal", "natural": [2, 6]},
        "prior": {"family": "mixture", "noise_dim": 3, "choice": True},
        **changes,
    }
    graphs = {
        "encoder": _gaussian_encoder(MIXTURE),
        "decoder": _decoder(MIXTURE),
        "joint": _joint(MIXTURE),
        "observation": _observation(MIXTURE),
        "prior": _prior(MIXTURE),
    }
    return _write(root, "mixture", MIXTURE, graphs, manifest)


def write_pca(root: Path, **changes: Any) -> Path:
    """The bundle ``pca``: z = V⁺ (x − μ), negative_error = −|x − V z − μ|²."""
    manifest = {
        "preprocessing": {"kind": "vector", "natural": [5]},
        "evidence": "none",
        "prior": {"family": "none"},
        "posterior": {"family": "point", "moments": "point"},
        "likelihood": {
            "family": "squared_error",
            "parameters": ["loc"],
            "measure": "none",
            "observation_noise": "none",
        },
        "scores": {"error": {"estimator": "reconstruction", "k": 1, "seed": 0, "unit": "squared error"}},
        "default_score": "error",
        **changes,
    }
    gain = np.linalg.pinv(PCA.weight)
    graphs = {
        "encoder": _point_encoder(PCA, gain, 0.0),
        "decoder": _decoder(PCA, ("loc",)),
        "joint": _error_joint(PCA),
    }
    return _write(root, "pca", PCA, graphs, manifest)


def write_whitening(root: Path, **changes: Any) -> Path:
    """The bundle ``whitening``: z = A⁻¹ (x − μ), log q = −log|det A⁻¹|, log p(x|z) = 0."""
    manifest = {
        "preprocessing": {"kind": "vector", "natural": [3]},
        "evidence": "exact",
        "posterior": {"family": "flow", "moments": "point"},
        "likelihood": {
            "family": "bijection",
            "parameters": ["loc"],
            "measure": "lebesgue",
            "pixelwise": False,
            "observation_noise": "none",
        },
        **changes,
    }
    inverse = np.linalg.inv(WHITENING.weight)
    graphs = {
        "encoder": _point_encoder(WHITENING, inverse, -np.linalg.slogdet(inverse)[1]),
        "decoder": _decoder(WHITENING, ("loc",)),
        "joint": _bijection_joint(WHITENING),
    }
    return _write(root, "whitening", WHITENING, graphs, manifest)


def _write(
    root: Path,
    name: str,
    model: Linear,
    graphs: dict[str, bytes],
    changes: dict[str, Any],
    more: dict[str, bytes] | None = None,
) -> Path:
    reference = _reference(model, graphs)
    outputs = [key for key in reference if "." in key]
    manifest: dict[str, Any] = {
        "name": name,
        "version": "1",
        "family": name,
        "signature": {
            "shape": list(model.shape),
            "latent_dim": model.weight.shape[1],
            "noise_dim": model.weight.shape[1] if "noise" in reference else 0,
        },
        "likelihood": {
            "family": "gaussian",
            "parameters": ["loc", "scale"],
            "measure": "lebesgue",
            "observation_noise": "standard_normal",
        },
        "graphs": {role: f"{role}.onnx" for role in graphs},
        "scores": {"elbo": {"estimator": "elbo", "k": 2, "seed": 0}},
        "default_score": "elbo",
        "reference": {
            "tolerances": {key: {"atol": 1e-5, "rtol": 1e-6} for key in outputs},
            "max_abs_error": dict.fromkeys(outputs, 0.0),
        },
        **changes,
    }
    files = {f"{role}.onnx": graph for role, graph in graphs.items()}
    return write_bundle(root, manifest, files | {"reference.npz": _npz(reference)} | (more or {}))


def _reference(model: Linear, graphs: dict[str, bytes], n: int = 6) -> dict[str, np.ndarray]:
    """Inputs, and the outputs of the graphs themselves: what they should be is the closed forms' to say."""
    random, latent = np.random.RandomState(3), model.weight.shape[1]
    found: dict[str, np.ndarray] = {"x": draw(model, n, seed=2)}
    noise = random.standard_normal((n, K, latent)).astype(np.float32)
    if "noise" in {tensor.name for tensor in _session(graphs["encoder"]).get_inputs()}:
        found["noise"] = noise

    def run(role: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = _session(graphs[role])
        names = [output.name for output in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        found.update({f"{role}.{name}": value for name, value in outputs.items()})
        return outputs

    encoded = run("encoder", dict(found))
    k = encoded["z"].shape[1]
    decoded = run("decoder", {"z": encoded["z"].reshape(n * k, latent)})
    parameters = {name: value for name, value in decoded.items() if name != "mean"}
    shaped = {name: value.reshape(n, k, *model.shape) for name, value in parameters.items()}
    run("joint", {"target": encoded["target"], "z": encoded["z"], **shaped})
    if "observation" in graphs:
        found["observation_noise"] = random.standard_normal(decoded["mean"].shape).astype(np.float32)
        run("observation", parameters | {"noise": found["observation_noise"]})
    if "prior" in graphs:
        found["prior_noise"] = random.standard_normal((7, latent)).astype(np.float32)
        found["prior_choice"] = random.random_sample(7).astype(np.float32)
        run("prior", {"noise": found["prior_noise"], "choice": found["prior_choice"]})
    return found


def _session(graph: bytes) -> ort.InferenceSession:
    return ort.InferenceSession(graph, providers=["CPUExecutionProvider"])


def _centred(g: GraphBuilder, model: Linear) -> str:
    """x − μ, float64 [N,D]."""
    return g.add("Sub", g.add("Reshape", g.double("x"), np.array([-1, len(model.mean)])), model.mean)


def _encoder_outputs(model: Linear, samples: int | str) -> Outputs:
    latent = model.weight.shape[1]
    return {
        "target": (["N", *model.shape], F),
        "loc": (["N", latent], F),
        "scale": (["N", latent], F),
        "z": (["N", samples, latent], F),
        "log_q_z": (["N", samples], D),
    }


def _gaussian_encoder(model: Linear) -> bytes:
    g, latent = GraphBuilder(), model.weight.shape[1]
    gain, cholesky = model.posterior()
    loc = g.add("MatMul", _centred(g, model), gain.T)
    centre = g.add("Unsqueeze", loc, np.array([1]))
    z = g.single(g.add("Add", centre, g.add("MatMul", g.double("noise"), cholesky.T)), "z")
    whitened = g.add("MatMul", g.add("Sub", g.double(z), centre), np.linalg.inv(cholesky).T)
    squares = g.add("ReduceSum", g.add("Mul", whitened, whitened), np.array([2]), keepdims=0)
    log_norm = np.log(np.diag(cholesky)).sum() + 0.5 * latent * LOG_2PI
    g.add("Sub", g.add("Mul", squares, np.array(-0.5)), np.array(log_norm), output="log_q_z")
    g.add("Identity", "x", output="target")
    g.single(loc, "loc")
    g.single(g.add("Add", g.add("Mul", loc, np.array(0.0)), np.sqrt((cholesky**2).sum(axis=1))), "scale")
    inputs: dict[str, list[int | str]] = {"x": ["N", *model.shape], "noise": ["N", "K", latent]}
    return g.build(inputs, _encoder_outputs(model, "K"))


def _point_encoder(model: Linear, gain: np.ndarray, log_q_z: float) -> bytes:
    g = GraphBuilder()
    loc = g.single(g.add("MatMul", _centred(g, model), gain.T), "loc")
    z = g.add("Unsqueeze", loc, np.array([1]), output="z")
    g.add("Mul", loc, np.array(0, np.float32), output="scale")
    none = g.add("ReduceSum", g.add("Mul", g.double(z), np.array(0.0)), np.array([2]), keepdims=0)
    g.add("Add", none, np.array(log_q_z), output="log_q_z")
    g.add("Identity", "x", output="target")
    return g.build({"x": ["N", *model.shape]}, _encoder_outputs(model, 1))


def _decoder(model: Linear, parameters: tuple[str, ...] = ("loc", "scale")) -> bytes:
    g = GraphBuilder()
    flat = g.add("Add", g.add("MatMul", g.double("z"), model.weight.T), model.mean)
    mean = g.single(g.add("Reshape", flat, np.array([-1, *model.shape])), "mean")
    g.add("Identity", mean, output="loc")
    if "scale" in parameters:
        zeros = g.add("Mul", mean, np.array(0, np.float32))
        g.add("Add", zeros, model.scale.reshape(model.shape).astype(np.float32), output="scale")
    outputs: Outputs = {name: (["M", *model.shape], F) for name in ("mean", *parameters)}
    return g.build({"z": ["M", model.weight.shape[1]]}, outputs)


def _build_joint(g: GraphBuilder, model: Linear, parameters: tuple[str, ...], fit: str = FIT) -> bytes:
    inputs: dict[str, list[int | str]] = {
        "target": ["N", *model.shape],
        "z": ["N", "K", model.weight.shape[1]],
        **{name: ["N", "K", *model.shape] for name in parameters},
    }
    outputs: Outputs = {
        fit: (["N", "K"], D),
        f"{fit}_map": (["N", "K", *model.shape], F),
        "log_p_z": (["N", "K"], D),
    }
    return g.build(inputs, outputs)


def _add_log_p_z(g: GraphBuilder, model: Linear) -> None:
    z, terms = g.double("z"), []
    for share, loc, scale in zip(*model.components, strict=True):
        whitened = g.add("Div", g.add("Sub", z, loc), np.array(scale))
        squares = g.add("ReduceSum", g.add("Mul", whitened, whitened), np.array([2]), keepdims=1)
        constant = np.log(share) - len(loc) * (np.log(scale) + 0.5 * LOG_2PI)
        terms.append(g.add("Add", g.add("Mul", squares, np.array(-0.5)), np.array(constant)))
    stacked = g.add("Concat", *terms, axis=2)
    g.add("ReduceLogSumExp", stacked, np.array([2]), keepdims=0, output="log_p_z")


def _joint(model: Linear) -> bytes:
    g = GraphBuilder()
    target, scale = g.add("Unsqueeze", g.double("target"), np.array([1])), g.double("scale")
    deltas = g.add("Div", g.add("Sub", target, g.double("loc")), scale)
    squares = g.add("Mul", g.add("Mul", deltas, deltas), np.array(-0.5))
    log_p = g.add("Sub", g.add("Sub", squares, g.add("Log", scale)), np.array(0.5 * LOG_2PI))
    g.add("ReduceSum", log_p, np.array([2, 3, 4]), keepdims=0, output=FIT)
    g.single(log_p, f"{FIT}_map")
    _add_log_p_z(g, model)
    return _build_joint(g, model, ("loc", "scale"))


def _error_joint(model: Linear) -> bytes:
    g = GraphBuilder()
    deltas = g.add("Sub", g.add("Unsqueeze", g.double("target"), np.array([1])), g.double("loc"))
    errors = g.add("Neg", g.add("Mul", deltas, deltas))
    g.add("ReduceSum", errors, np.array([2, 3, 4]), keepdims=0, output="negative_error")
    g.single(errors, "negative_error_map")
    g.add("ReduceSum", g.add("Mul", g.double("z"), np.array(0.0)), np.array([2]), keepdims=0, output="log_p_z")
    return _build_joint(g, model, ("loc",), "negative_error")


def _bijection_joint(model: Linear) -> bytes:
    g = GraphBuilder()
    nothing = g.add("Mul", g.double("loc"), np.array(0.0))
    g.add("ReduceSum", nothing, np.array([2, 3, 4]), keepdims=0, output=FIT)
    g.single(nothing, f"{FIT}_map")
    _add_log_p_z(g, model)
    return _build_joint(g, model, ("loc",))


def _observation(model: Linear) -> bytes:
    g = GraphBuilder()
    g.add("Add", "loc", g.add("Mul", "scale", "noise"), output="sample")
    inputs: dict[str, list[int | str]] = {name: ["M", *model.shape] for name in ("loc", "scale", "noise")}
    return g.build(inputs, {"sample": (["M", *model.shape], F)})


def _prior(model: Linear) -> bytes:
    """z = m_j + s_j noise, j the first component where choice < its share."""
    g = GraphBuilder()
    (share, _), locs, scales = model.components
    first = g.add("Less", g.add("Unsqueeze", "choice", np.array([1])), np.array(share, np.float32))
    draws = [
        g.add("Add", g.add("Mul", "noise", np.array(scale, np.float32)), loc.astype(np.float32))
        for loc, scale in zip(locs, scales, strict=True)
    ]
    g.add("Where", first, *draws, output="z")
    latent = model.weight.shape[1]
    return g.build({"noise": ["M", latent], "choice": ["M"]}, {"z": (["M", latent], F)})


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()

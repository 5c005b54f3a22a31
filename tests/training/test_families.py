"""Every family, from the configuration to a calibrated bundle, served by the one service: its numbers are torch's."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from service.bundle.files import open_bundle
from service.inference import noise
from service.inference.model import Model
from service.inference.sessions import Runtime
from tests.service.http import serving
from training.batches import to_unit
from training.calibrate import calibrate
from training.config import load_config
from training.evaluate import evaluate
from training.models.build import FAMILIES
from training.pipeline import fit_stage
from training.runs import Launch
from training.staging import export

TINY = {"hidden": [12]}
DELTA, SQUARED = {"family": "delta"}, {"family": "squared_error"}
CASES = {
    "vae, IAF and a flow prior": {
        "network": TINY,
        "posterior": {"family": "iaf", "steps": 2, "hidden": 8},
        "prior": {"family": "flow", "steps": 2, "hidden": 8},
    },
    "vae, Householder and a VampPrior": {
        "network": TINY,
        "posterior": {"family": "diagonal_gaussian"},
        "prior": {"family": "vamp", "components": 5},
        "likelihood": {"family": "continuous_bernoulli"},
    },
    "vae, Sylvester, mixture of logistics": {
        "network": TINY,
        "posterior": {"family": "sylvester", "steps": 2, "rank": 2, "vectors": 2},
        "likelihood": {"family": "logistic_mixture"},
    },
    "ladder": {"family": "ladder", "ladder": {"channels": [6, 8], "latents": [2, 2], "layers": [1, 1]}},
    "flow": {"family": "flow", "likelihood": DELTA, "flow": {"levels": 1, "steps": 2, "hidden": 8}},
    "ica": {"family": "ica", "likelihood": DELTA},
    "ppca": {"family": "ppca", "latent_dim": 4, "likelihood": {"family": "gaussian", "scale": "shared"}},
    "fa": {"family": "fa", "latent_dim": 4, "likelihood": {"family": "gaussian", "scale": "diagonal"}},
    "pca": {"family": "pca", "latent_dim": 4, "likelihood": SQUARED},
    "linear autoencoder": {"family": "linear_autoencoder", "latent_dim": 4, "likelihood": SQUARED},
    "autoencoder": {"family": "autoencoder", "network": TINY, "likelihood": SQUARED},
}
EVIDENCE = {"ica": "exact", "flow": "exact", "ppca": "exact", "fa": "exact"} | dict.fromkeys(
    ("pca", "linear_autoencoder", "autoencoder"), "none"
)


def test_every_family_is_here():
    assert {case.get("family", "vae") for case in CASES.values()} == set(FAMILIES)


@pytest.fixture(scope="module", params=CASES, ids=str)
def fitted(request, tmp_path_factory):
    """A run of two epochs on digits, and its calibrated bundle as the service sees it."""
    folder = tmp_path_factory.mktemp("family")
    tree = {
        "name": "tiny",
        "data": {"source": "digits", "limit": 700, "calibration": 0.2, "test": 0.2},
        "model": {"latent_dim": 3} | CASES[request.param],
        "optimiser": {"epochs": 2},
        "run": {"threads": 1},
        "evaluate": {"k": 4},
        "score": {"k": 2},
    }
    run, _ = fit_stage(load_config(None, [], tree), folder / "run", Launch(), False, Console(file=io.StringIO()))
    export(run)
    return run, Model.load(open_bundle(calibrate(run)), Runtime("cpu"))


def log_weights(model, x, definition):
    """log p(x|z), log p(z), log q(z|x) [N,K] by torch, at the noise that the service draws for a score."""
    draws = torch.from_numpy(noise.posterior_noise(definition.seed, definition.k, model.noise_dim).copy())
    dither = torch.from_numpy(noise.dither(definition.seed, model.shape).copy()).expand_as(x)
    encoded = model.encode(x, draws.expand(len(x), -1, -1), dither if model.likelihood.dither else None)
    decoded = model.decode(encoded.z.flatten(0, 1))
    parameters = tuple(p.unflatten(0, encoded.z.shape[:2]) for p in decoded.parameters)
    density = model.density(encoded.target, encoded.z, parameters)
    return density.log_p_x, density.log_p_z, encoded.log_q


@torch.no_grad()
def test_served_scores_are_torchs(fitted):
    run, served = fitted
    definition = served.manifest.scores["reconstruction" if served.manifest.evidence == "none" else "elbo"]
    x = to_unit(run.dataset.pixels(run.dataset.splits["test"][:6]))
    log_p_x, log_p_z, log_q = log_weights(run.model, x, definition)
    scores = served.score(x.numpy(), definition)
    expected = -log_p_x if served.manifest.evidence == "none" else -(log_p_x + log_p_z - log_q)
    tolerance = {"rtol": 2e-5, "atol": 2e-3}
    np.testing.assert_allclose(scores.score, expected.mean(1), **tolerance)
    if served.manifest.evidence == "exact":
        again = served.score(x.numpy(), definition.model_copy(update={"k": 3})).score
        np.testing.assert_allclose(again, scores.score, **tolerance, err_msg="log p(x) depends on z")


def test_evidence_and_the_metrics_agree(fitted):
    run, served = fitted
    manifest = served.manifest
    assert manifest.evidence == EVIDENCE.get(manifest.family, "bound")
    metrics, _ = evaluate(run.model, run.dataset, "test", run.config.evaluate)
    assert ("log_likelihood" in metrics) == (manifest.evidence != "none")
    if manifest.evidence == "bound":
        assert metrics["elbo"] <= metrics["log_likelihood"]
    if manifest.evidence == "exact":
        assert metrics["elbo"] == pytest.approx(metrics["log_likelihood"], rel=1e-4, abs=1e-2)


def test_every_verb_answers_or_says_why_not(fitted):
    run, served = fitted
    pixels = np.ascontiguousarray(run.dataset.pixels(run.dataset.splits["test"][:2]))
    body = pixels.astype(np.uint8).tobytes()
    octets = {"content-type": "application/octet-stream"}
    with serving(served.bundle.path.parents[1]) as client:
        verbs = {
            "encode": client.post("/v1/models/tiny/encode", content=body, headers=octets),
            "encode.samples": client.post("/v1/models/tiny/encode?samples=2", content=body, headers=octets),
            "reconstruct": client.post("/v1/models/tiny/reconstruct", content=body, headers=octets),
            "sample": client.get("/v1/models/tiny/sample?n=2"),
            "sample.draw": client.get("/v1/models/tiny/sample?n=2&draw=true"),
            "interpolate": client.post("/v1/models/tiny/interpolate?steps=3", content=body, headers=octets),
            "score": client.post("/v1/models/tiny/score", content=body, headers=octets),
            "score.map": client.post("/v1/models/tiny/score?map=true", content=body, headers=octets),
            "score.elbo": client.post("/v1/models/tiny/score?estimator=elbo", content=body, headers=octets),
        }
        latents = {"latents": [[0.0] * served.manifest.signature.latent_dim]}
        verbs["decode"] = client.post("/v1/models/tiny/decode", json=latents)
    for verb, answer in verbs.items():
        if verb in served.refused:
            assert answer.status_code == 409, verb
            assert served.refused[verb] in answer.json()["detail"]
        else:
            assert answer.status_code == 200, (verb, answer.text[:300])
    assert "score" not in served.refused
    assert verbs["score"].json()["results"][0]["p_value"] is not None

"""Every family, from the configuration to a calibrated bundle, served by the one service: its numbers are torch's."""

from typing import get_args

import numpy as np
import pytest
import torch

from service.inference import noise
from tests.service.http import serving
from tests.training.shared import CASES
from training.config import LikelihoodConfig, PosteriorConfig, PriorConfig
from training.data.batches import to_unit
from training.evaluation.evaluate import evaluate
from training.models.registry import FAMILIES

EVIDENCE = {"ica": "exact", "flow": "exact", "ppca": "exact", "fa": "exact"} | dict.fromkeys(
    ("pca", "linear_autoencoder", "autoencoder"), "none"
)


def choices(section):
    """The families that a section of the configuration lets choose from."""
    return set(get_args(section.model_fields["family"].annotation))


def test_every_family_is_here_and_every_part_of_a_vae():
    assert {case.get("family", "vae") for case in CASES.values()} == set(FAMILIES)
    for section, name in ((PosteriorConfig, "posterior"), (PriorConfig, "prior"), (LikelihoodConfig, "likelihood")):
        exported = {case[name].get("family", "bernoulli") for case in CASES.values() if name in case}
        exported |= {section().family}
        assert exported >= choices(section) - {"cross_entropy"}, "which test_autoencoder exports"


@pytest.fixture(scope="module", params=CASES, ids=str)
def fitted(request, fitted_family):
    return fitted_family(request.param)


def log_weights(model, x, definition):
    """log p(x|z) or the negative error, log p(z), log q(z|x) [N,K] by torch, at the noise of the service."""
    draws = torch.from_numpy(noise.posterior_noise(definition.seed, definition.k, model.noise_dim).copy())
    dither = torch.from_numpy(noise.dither(definition.seed, model.shape).copy()).expand_as(x)
    target = model.likelihood.target(x, dither if model.likelihood.dither else None)
    z, log_q_z = model.encode(target).rsample(draws.expand(len(x), -1, -1))
    fit, _, log_p_z = model.joint(target, z, model.decode_samples(z))
    return fit, log_p_z, log_q_z


@torch.no_grad()
def test_served_scores_are_torchs(fitted):
    run, served = fitted
    definition = served.manifest.scores["reconstruction" if served.manifest.evidence == "none" else "elbo"]
    x = to_unit(run.dataset.pixels(run.dataset.splits["test"][:6]))
    fit, log_p_z, log_q_z = log_weights(run.model, x, definition)
    scores = served.score(x.numpy(), definition)
    expected = -fit if served.manifest.evidence == "none" else -(fit + log_p_z - log_q_z)
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
    x = to_unit(run.dataset.pixels(run.dataset.splits["test"][:2])).numpy()
    body = np.round(255 * x).astype(np.uint8).tobytes()
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

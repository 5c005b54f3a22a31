from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import pmean

from service.bundle.files import open_bundle
from service.bundle.manifest import Manifest
from service.inference.model import Model
from service.scores import chunks as groups
from service.scores.code_length import code_lengths
from service.scores.forward_pass import norms, path_statistics, statistic_names, statistics, steepness
from tests.ppca_bundle import images
from tests.service.fitted_bundles import FAMILIES

X = images(9, seed=5)
vectors = hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(-1e3, 1e3))


def of_kind(manifest: Manifest, **changes: object) -> Manifest:
    """The manifest of another kind of model."""
    document = manifest.model_dump(mode="json") | changes
    if document["posterior"]["moments"] == "point":
        document["signature"]["noise_dim"] = 0
    return Manifest.model_validate(document)


POINT = {"family": "point", "moments": "point"}
NO_LIKELIHOOD = {
    "evidence": "none",
    "posterior": POINT,
    "prior": {"family": "none"},
    "likelihood": {"family": "e", "parameters": ["loc"], "measure": "none", "observation_noise": "none"},
    "scores": {"error": {"estimator": "reconstruction", "k": 1, "seed": 0}},
    "default_score": "error",
    "calibration": None,
}
BIJECTION = {
    "evidence": "exact",
    "posterior": POINT,
    "likelihood": {
        "family": "b",
        "parameters": ["loc"],
        "measure": "lebesgue",
        "pixelwise": False,
        "observation_noise": "none",
    },
}


# Norms.


@given(vectors.filter(lambda v: (np.abs(v) > 1e-3).all()))
def test_norms_are_power_means(values):
    size = np.abs(values)
    wanted = [pmean(size, p) for p in (0.5, 1, 2, 4)] + [size.max()]
    assert np.allclose(norms(values[None])[0], np.log(wanted), atol=1e-6)


@given(vectors)
def test_power_means_grow_with_their_order(values):
    assert (np.diff(norms(values[None])[0]) >= -1e-9).all()


@given(vectors.filter(lambda v: np.abs(v).max() > 1e-3), st.floats(1e-2, 1e3))
def test_a_factor_shifts_the_larger_norms_alike(values, factor):
    assert np.allclose((norms(values[None] * factor) - norms(values[None]))[0, 1:], np.log(factor), atol=1e-4)


def test_the_norms_of_nothing_are_finite():
    assert np.isfinite(norms(np.zeros((1, 2, 2)))).all()


# The path and the statistics.


def test_the_path_is_of_what_the_model_has(model):
    assert {name.split("_")[0] for name in statistic_names(path_statistics, model.manifest)} == {
        "mu",
        "residual",
        "sigma",
    }
    for changes, wanted in ((NO_LIKELIHOOD, {"mu", "residual"}), (BIJECTION, {"mu"})):
        names = statistic_names(path_statistics, of_kind(model.manifest, **changes))
        assert {name.split("_")[0] for name in names} == wanted
        assert len(names) == 5 * len(wanted)


def test_the_statistics_are_those_that_the_model_has(model):
    picture = {"steepness", "steepness_mean", "steepness_residual", "code_length"}
    residual = {"residual_1", "residual_2", "residual_4"}
    assert set(statistic_names(statistics, model.manifest)) == {"distortion", "prior", "rate", *residual, *picture}
    none = statistic_names(statistics, of_kind(model.manifest, **NO_LIKELIHOOD))
    assert set(none) == {"distortion", *residual, *picture}
    bijection = statistic_names(statistics, of_kind(model.manifest, **BIJECTION))
    assert set(bijection) == {"prior", "posterior", "steepness", "code_length"}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_the_same_for_every_row(tmp_path, runtime, family):
    """What detectors.npz is checked against is what a row gives."""
    model = Model.load(open_bundle(FAMILIES[family].write(tmp_path)), runtime)
    measured = model.forward_pass(FAMILIES[family].inliers(2, 0), k=2, seed=0)
    for kind in (statistics, path_statistics):
        found = kind(measured, model.manifest)
        assert tuple(found) == statistic_names(kind, model.manifest)
        assert all(column.shape == (2,) and column.dtype == np.float64 for column in found.values())


def test_statistics_are_what_they_say(model):
    scores = model.score(X, model.manifest.scores["elbo"])
    measured = model.forward_pass(X, k=4, seed=0)
    residual = X - model.reconstruct(X)
    for index, x in enumerate(X):
        found = {name: column[index] for name, column in statistics(measured, model.manifest).items()}
        assert found["distortion"] == pytest.approx(scores.distortion[index])
        assert found["rate"] == pytest.approx(scores.rate[index])
        assert found["distortion"] + found["rate"] == pytest.approx(-scores.elbo[index])
        assert found["prior"] == pytest.approx(-measured.log_p_z[index].mean())
        assert found["residual_2"] == pytest.approx(np.log(np.sqrt((residual[index] ** 2).mean())))
        assert found["code_length"] == pytest.approx(np.log(code_lengths(x[None])[0] + 35))
        assert found["steepness"] == steepness(x[None])[0]


# Steepness.


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 1))
def test_the_steepness_of_a_ramp(down, across, level):
    i, j = np.indices((5, 7))
    assert steepness((down * i + across * j + level)[None, None])[0] == pytest.approx(
        np.log(abs(down) + abs(across) + 1e-3), abs=1e-6
    )


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 1), (1, 4, 4), (2, 1, 9)])
def test_nothing_is_steep_in_what_is_flat(shape):
    assert steepness(np.full((1, *shape), 0.3))[0] == pytest.approx(np.log(1e-3))


def test_a_signal_is_steep_along_its_steps_alone():
    x = np.cumsum(np.full((2, 1, 9), 0.25), axis=2)
    assert steepness(x[None])[0] == pytest.approx(np.log(0.251))


# Measured.


def test_a_pass_holds_what_it_says(model, ppca):
    measured = model.forward_pass(X, k=3, seed=7)
    encoding = model.encode(X, seed=7)
    assert np.array_equal(measured.loc, encoding.loc)
    assert np.array_equal(measured.scale, encoding.scale)
    assert np.array_equal(measured.mean, model.decode(encoding.loc))
    assert np.allclose(measured.log_w, ppca.log_likelihood(X)[:, None], atol=1e-4)
    assert np.allclose(measured.distortion.sum(axis=(1, 2, 3)), -measured.log_p_x_given_z.mean(axis=1), rtol=1e-5)


def test_fewer_samples_are_the_first(model):
    measured = model.forward_pass(X, k=5, seed=7)
    first, fewer = measured.first(2), model.forward_pass(X, k=2, seed=7)
    for name in ("log_p_x_given_z", "log_p_z", "log_q_z", "loc", "mean"):
        assert np.array_equal(getattr(first, name), getattr(fewer, name))


def test_a_row_is_itself_alone(model):
    together = model.forward_pass(X, k=3, seed=0)
    for index in range(len(X)):
        alone, row = model.forward_pass(X[index : index + 1], k=3, seed=0), together.rows(slice(index, index + 1))
        assert all(np.array_equal(a, b) for a, b in zip(row.arrays, alone.arrays, strict=True))


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 13, 17), (2, 1, 33), (1, 1, 5), (3, 64, 64)])
def test_statistics_of_a_row_do_not_depend_on_the_rows_beside_it(monkeypatch, shape):
    """Bitwise, and whether or not the rows go through in groups."""
    x = np.random.RandomState(0).random_sample((37, *shape)).astype(np.float32)
    for function in (norms, steepness, code_lengths):
        alone = np.concatenate([function(x[i : i + 1]) for i in range(len(x))])
        for few in (2**30, 5 * x[0].size):
            monkeypatch.setattr(groups, "NUMBERS", few)
            assert np.array_equal(function(x), alone)
            assert np.array_equal(function(x[3:20]), alone[3:20])

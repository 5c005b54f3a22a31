from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kstest

from service.bundle.files import open_bundle
from service.bundle.manifest import ScoreDefinition
from service.errors import InvalidInput
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.scores.fitting import (
    MIN_ROWS,
    fit_detectors,
    fitted_arrays,
    fitted_definitions,
    max_held_out_rows,
    max_reference_rows,
)
from tests.ppca_bundle import images, write_ppca_bundle
from tests.service.fitted_bundles import FAMILIES, fit
from tests.service.scores.test_forward_pass import BIJECTION, NO_LIKELIHOOD, of_kind


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def loaded(path: Path) -> Model:
    return Model.load(open_bundle(path), Runtime("cpu"))


def fitted(model: Model, held_out: np.ndarray, reference: np.ndarray) -> dict[str, np.ndarray]:
    definitions = model.manifest.scores | fitted_definitions(model.manifest)
    return fitted_arrays(model, definitions, held_out, reference)


# Which scores there are.


def test_a_family_is_given_the_scores_that_are_defined_for_it(tmp_path, family):
    manifest = open_bundle(FAMILIES[family].write(tmp_path)).manifest
    definitions = fitted_definitions(manifest)
    assert set(definitions) == set(FAMILIES[family].scores)
    base = manifest.scores[manifest.default_score]
    assert {(each.k, each.seed) for each in definitions.values()} == {(base.k, base.seed)}
    assert all(each.description for each in definitions.values())
    assert list(definitions)[-1] == "combined"
    assert set(definitions["combined"].of) <= set(definitions)


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        (NO_LIKELIHOOD, {"rate", "reconstruction", "typicality", "complexity", "debiased"}),
        (BIJECTION, {"rate", "reconstruction", "debiased", "residual", "peak"}),
    ],
    ids=["autoencoder", "flow"],
)
def test_pictures_of_other_families_lack_what_they_cannot_have(model, changes, absent):
    definitions = fitted_definitions(of_kind(model.manifest, **changes))
    assert set(FAMILIES["pictures"].scores) - set(definitions) == absent
    assert set(definitions["combined"].of) <= set(definitions)


def test_a_score_that_a_bundle_has_is_left_alone(model):
    own = {"estimator": "rate", "k": 9, "seed": 5, "description": "its own"}
    scores = {name: each.model_dump() for name, each in model.manifest.scores.items()} | {"rate": own}
    manifest = of_kind(model.manifest, scores=scores, calibration=None)
    assert "rate" not in fitted_definitions(manifest)


# Hostile and degenerate rows.


def degenerate(rows: np.ndarray, kind: str) -> np.ndarray:
    """Rows all alike; alike in halves; each constant; one place alone varying."""
    if kind == "equal":
        return np.stack([rows[0]] * len(rows))
    if kind == "two":
        return np.stack([rows[i % 2] for i in range(len(rows))])
    if kind == "flat":
        return np.stack([np.full_like(rows[0], row.flat[0]) for row in rows])
    out = np.stack([rows[0]] * len(rows))
    out.reshape(len(rows), -1)[:, 1] = rows.reshape(len(rows), -1)[:, 1]
    return out


@pytest.mark.parametrize("kind", ["equal", "two", "flat", "one place"])
def test_degenerate_rows_fit_and_score_finitely(tmp_path, family, kind):
    write, inliers, _ = FAMILIES[family]
    rows = degenerate(inliers(MIN_ROWS, 1), kind)
    model = loaded(fit(write(tmp_path / "plain"), tmp_path, rows, rows[:1]))
    for x in (rows, inliers(9, 3), np.zeros_like(rows[:1])):
        for name, scores in model.score(x, also=model.manifest.scores).also.items():
            assert np.isfinite(scores).all(), name
    if kind == "equal":
        combined = model.manifest.scores["combined"]
        assert model.score(inliers(9, 3), combined).score.min() > model.score(rows[:1], combined).score[0]


def test_black_pictures_fit_and_score_finitely(ppca_path, tmp_path):
    rows = np.zeros((MIN_ROWS, 1, 8, 8), np.float32)
    model = loaded(fit(ppca_path, tmp_path, rows, rows))
    scores = model.score(np.concatenate([rows[:2], images(3)]), also=model.manifest.scores).also
    assert all(np.isfinite(each).all() for each in scores.values())
    assert scores["combined"][2:].min() > scores["combined"][:2].max()


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 1, 5), (1, 5, 1)])
def test_pictures_of_a_pixel_or_a_line_fit_and_score_finitely(tmp_path, shape):
    random = np.random.RandomState(0)

    def pictures(n: int) -> np.ndarray:
        return (random.randint(256, size=(n, *shape)) / 255).astype(np.float32)

    path, _ = write_ppca_bundle(tmp_path / "plain", shape=shape, latent_dim=1)
    model = loaded(fit(path, tmp_path, pictures(30), pictures(30)))
    for name, scores in model.score(pictures(9), also=model.manifest.scores).also.items():
        assert np.isfinite(scores).all(), name


def test_a_dead_latent_dimension_changes_nothing(tmp_path):
    """A latent that the encoder leaves at its prior: loc 0 and scale 1 for every row."""
    path, _ = write_ppca_bundle(tmp_path / "plain", latent_dim=5)
    model = loaded(path)
    forward_pass, encode = model.forward_pass, model.encode

    def dead(measured):
        loc, scale = measured.loc.copy(), measured.scale.copy()
        loc[:, 2], scale[:, 2] = 0, 1
        return (
            measured._replace(loc=loc, scale=scale)
            if isinstance(measured, tuple)
            else replace(measured, loc=loc, scale=scale)
        )

    model.forward_pass = lambda *arguments: dead(forward_pass(*arguments))  # type: ignore[method-assign]
    model.encode = lambda *arguments, **more: dead(encode(*arguments, **more))  # type: ignore[method-assign]
    arrays = fitted(model, images(30, seed=1), images(30, seed=2))
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert (arrays["latent/reference"][:, 2] == 0).all()


# What is fitted to what.


@pytest.mark.parametrize("n", [0, 1, MIN_ROWS - 1])
def test_too_few_rows_are_refused_in_words(model, n):
    with pytest.raises(InvalidInput, match=f"{n} rows to fit .* on, expected at least {MIN_ROWS}"):
        fitted(model, images(n) if n else images(1)[:0], images(5))


def test_no_reference_is_refused_in_words(model):
    with pytest.raises(InvalidInput, match="no rows to compare codes with"):
        fitted(model, images(MIN_ROWS), images(1)[:0])


def test_the_combination_is_fitted_to_rows_that_its_parts_do_not_see(model):
    """The first half fits the parts, the second their tails."""
    rows, reference = images(60, seed=1), images(30, seed=2)
    plain = fitted(model, rows, reference)
    tails = fitted(model, np.concatenate([rows[:30], images(30, seed=3)]), reference)
    changed = {name for name, array in plain.items() if not np.array_equal(array, tails[name])}
    own = {name for name in changed if not name.startswith("@map/")}
    assert own == {"combined/knots", "combined/scale"}
    assert not {name for name in changed if name.startswith(("@map/texture", "@map/mean", "@map/scale", "@map/level"))}


def test_fitting_twice_is_fitting_once(model):
    rows, reference = images(40, seed=1), images(30, seed=2)
    once, again = fitted(model, rows, reference), fitted(model, rows, reference)
    assert all(np.array_equal(once[name], again[name]) for name in once)
    assert set(once) == set(again)


def test_the_latent_score_compares_with_the_codes_of_the_reference(model):
    reference = images(100, seed=2)
    arrays = fitted(model, images(MIN_ROWS), reference)
    assert np.array_equal(arrays["latent/reference"], model.encode(reference).loc)


def test_progress_counts_rows(model):
    definitions = fitted_definitions(model.manifest)
    seen: list[int] = []
    fitted_arrays(model, definitions, images(150), images(5), progress=seen.append)
    # all for the map; the first half through plain and stretched images, the second through the combination
    assert sum(seen) == 150 + 75 + 75 + 75


def test_room_is_bounded(model):
    large = of_kind(
        model.manifest,
        preprocessing={"mode": "RGB", "height": 2048, "width": 2048},
        signature={"shape": [3, 2048, 2048], "latent_dim": 2**20, "noise_dim": 5},
    )
    for manifest, rows, codes in ((model.manifest, 4096, 2**18 // 5), (large, MIN_ROWS, MIN_ROWS)):
        assert max_held_out_rows(manifest) == rows
        assert max_reference_rows(manifest) == codes


@pytest.mark.parametrize("name", ["residual", "statistics", "combined"])
def test_held_out_scores_are_those_of_fresh_inliers(tmp_path, name):
    """No part of the fit is seen by rows that come later: two fresh halves score alike."""
    model = loaded(fit(FAMILIES["pictures"].write(tmp_path / "plain"), tmp_path, images(400, seed=1), images(99)))
    each = model.manifest.scores[name]
    a, b = (model.score(images(300, seed=seed), each).score for seed in (5, 6))
    assert kstest(a, b).pvalue > 0.01


def test_a_definition_of_samples_alone_fits_nothing(model):
    assert fit_detectors(model, {"elbo": ScoreDefinition(estimator="elbo", k=1, seed=0)}, images(20), images(2)) == {}

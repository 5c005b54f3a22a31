from __future__ import annotations

import io
import math
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.distance import mahalanobis
from scipy.stats import expon, gamma, kstest, skew
from sklearn.covariance import ledoit_wolf
from sklearn.neighbors import NearestNeighbors

from service.bundle.files import open_bundle
from service.bundle.manifest import DETECTORS, FITTED, Manifest, ScoreDefinition
from service.errors import BundleFormatError
from service.inference.model import Model
from service.scores import nearest_neighbours as neighbours
from service.scores.code_length import code_lengths
from service.scores.detectors import (
    CLASSES,
    Combination,
    Complexity,
    Debiased,
    Latent,
    Path,
    Residual,
    Statistics,
    Typicality,
    detector_arrays,
    load_detectors,
    stretched,
)
from service.scores.forward_pass import Measured, path_statistics, statistics
from service.scores.forward_pass import table as table_of
from service.scores.gaussian import normalised, quantiles
from service.scores.nearest_neighbours import Neighbours
from tests.ppca_bundle import images
from tests.service.fitted_bundles import FAMILIES, fit, npz, rewrite
from tests.service.scores.test_forward_pass import BIJECTION, NO_LIKELIHOOD, of_kind


@pytest.fixture(scope="module")
def manifest(model) -> Manifest:
    return model.manifest


def definition(estimator: str, method: str | None = None) -> ScoreDefinition:
    return ScoreDefinition(estimator=estimator, k=2, seed=0, method=method)


def simulated(
    x: np.ndarray, surprisal: np.ndarray | None = None, distortion: np.ndarray | None = None, seed: int = 0
) -> Measured:
    """A pass of random numbers but for x, −elbo [N] and −log p(x|z) by place [N,C,H,W]; k = 2."""
    random, n = np.random.RandomState(seed), len(x)
    mean = (x + 0.1 * random.standard_normal(x.shape)).astype(np.float32)
    loc, scale = random.standard_normal((n, 5)), np.exp(0.1 * random.standard_normal((n, 5)))
    places = np.square(x - mean, dtype=np.float64) * 50 if distortion is None else distortion
    log_p_x = np.stack([-places.sum(axis=(1, 2, 3))] * 2, axis=1)
    log_p_z, log_q = random.standard_normal((2, n, 2))
    if surprisal is not None:
        log_q = log_p_x + log_p_z + surprisal[:, None]
    return Measured(x, mean, loc.astype(np.float32), scale.astype(np.float32), log_p_x, log_p_z, log_q, places, places)


def in_parts(measured: Measured, size: int = 7) -> list[Measured]:
    return [measured.rows(slice(i, i + size)) for i in range(0, len(measured.x), size)]


# Typicality and complexity.


def test_typicality_looks_to_both_sides(manifest):
    random = np.random.RandomState(0)
    inliers = simulated(images(40), 100 + random.standard_normal(40))
    detector = Typicality.fit(in_parts(inliers), definition("typicality"), manifest)
    mean = -inliers.log_w.mean()
    probes = simulated(images(5), mean + np.array([0.0, 10.0, -10.0, 50.0, -3.0]))
    assert detector.score(probes) == pytest.approx([0, 10, 10, 50, 3], abs=1e-9)


def test_complexity_removes_what_the_length_explains(manifest):
    random, x = np.random.RandomState(0), images(60)
    lengths = code_lengths(x)
    surprisals = 0.7 * lengths + 30 + random.standard_normal(60)
    detector = Complexity.fit(in_parts(simulated(x, surprisals)), definition("complexity"), manifest)
    scores = detector.score(simulated(x, surprisals))
    assert scores == pytest.approx(surprisals - np.polyval(np.polyfit(lengths, surprisals, 1), lengths), abs=1e-6)
    assert abs(np.corrcoef(scores, lengths)[0, 1]) < 1e-6
    assert scores.mean() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("picture", [images(1)[0], np.full((1, 8, 8), 0.3, np.float32)], ids=["waves", "flat"])
def test_complexity_of_pictures_of_one_length_has_no_slope(manifest, picture):
    """Their mean length differs from each by rounding: that is no slope to fit."""
    x = np.stack([picture] * 49)
    surprisals = np.random.RandomState(0).standard_normal(49) + 100
    detector = Complexity.fit(in_parts(simulated(x, surprisals)), definition("complexity"), manifest)
    other = simulated(images(3, seed=8), np.full(3, 100.0))
    assert detector.score(other) == pytest.approx(100 - surprisals.mean() * np.ones(3))


# Debiased.


def costs(x: np.ndarray) -> np.ndarray:
    """−log p of a perfect reconstruction that depends on the level alone, as a likelihood of pixels has it."""
    return 3 - 2 * np.cos(5 * x.astype(np.float64)) + x


def test_levels_that_are_equally_well_reconstructed_have_no_bias(manifest):
    rates = np.array([1.0, 2.0, -0.5])
    fitted = Debiased.fit(in_parts(simulated(X, distortion=costs(X))), definition("debiased"), manifest)
    x = stretched(images(3, seed=4))
    surprisal = costs(x).sum(axis=(1, 2, 3)) + rates
    assert fitted.score(simulated(x, surprisal, costs(x))) == pytest.approx(rates, abs=0.3)
    assert np.ptp(surprisal) > 30 * 0.3


def test_a_level_s_best_is_its_95_percent_quantile_channel_by_channel(manifest):
    random = np.random.RandomState(0)
    x = random.choice([0.0, 0.2, 1.0], size=(50, 3, 4, 4)).astype(np.float32)
    places = random.exponential(size=x.shape) + np.arange(3)[:, None, None]
    of_colours = of_kind(
        manifest,
        preprocessing={"mode": "RGB", "height": 4, "width": 4},
        signature={"shape": [3, 4, 4], "latent_dim": 5, "noise_dim": 5},
    )
    best = Debiased.fit(in_parts(simulated(x, distortion=places)), definition("debiased"), of_colours).arrays["best"]
    for channel in range(3):
        for level in (0, 51, 255):
            chosen = -places[:, channel][np.rint(x[:, channel] * 255) == level]
            assert best[channel, level] == pytest.approx(np.quantile(chosen, 0.95))
        known = best[channel, [0, 51, 255]]
        assert np.allclose(best[channel], np.interp(np.arange(256), [0, 51, 255], known))


X = stretched(images(200))


@given(st.floats(0.3, 1.0), st.floats(0, 1))
def test_contrast_and_brightness_are_stretched_away(contrast, brightness):
    x = images(3, (1, 16, 16))
    faded = (x * contrast + brightness * (1 - contrast)).astype(np.float32)
    assert np.abs(stretched(faded) - stretched(x)).max() <= 1.001 / 255


def test_stretching_sends_the_5th_and_95th_percentile_to_0_and_1():
    x = images(4, (3, 10, 10)) * 0.5 + 0.2
    out = stretched(x)
    assert np.allclose(out * 255, np.rint(out * 255), atol=1e-4)
    for image, result in zip(x, out, strict=True):
        low, high = np.percentile(image, [5, 95])
        assert (result[image <= low] == 0).all()
        assert (result[image >= high] == 1).all()
        inside = (image > low) & (image < high)
        assert np.allclose(result[inside], (image[inside] - low) / (high - low), atol=0.51 / 255)


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_what_has_no_contrast_stays(value):
    x = np.full((1, 1, 8, 8), np.rint(value * 255) / 255, np.float32)
    assert np.array_equal(stretched(x), x)
    x[0, 0, 3, 3] = 0.0  # one pixel in 64 is beyond the percentiles
    assert np.array_equal(stretched(x), x)


def test_stretching_leaves_its_input_and_a_row_to_itself():
    x = images(5)
    kept = x.copy()
    together = stretched(x)
    assert np.array_equal(x, kept)
    assert all(np.array_equal(stretched(x[i : i + 1])[0], together[i]) for i in range(5))


# Path.


def paths(measured: Measured, manifest: Manifest) -> np.ndarray:
    return table_of(path_statistics, measured, manifest)


@pytest.fixture(scope="module")
def inliers() -> Measured:
    return simulated(images(150))


def test_the_path_by_mahalanobis(manifest, inliers):
    detector = Path.fit(in_parts(inliers), definition("path", "mahalanobis"), manifest)
    rows = paths(inliers, manifest)
    grid = quantiles(rows)
    z = np.array([normalised(row, grid) for row in rows])
    scale = z.std(axis=0)
    covariance = ledoit_wolf(z / scale)[0] + 1e-6 * np.eye(15)
    fresh = simulated(images(6, seed=3), seed=4)
    for row, score in zip(paths(fresh, manifest), detector.score(fresh), strict=True):
        distance = mahalanobis(normalised(row, grid) / scale, z.mean(axis=0) / scale, np.linalg.inv(covariance))
        assert score == pytest.approx(math.log(distance**2 / 15), rel=1e-6)


def copod(rows: np.ndarray, new: np.ndarray) -> list[float]:
    """Li et al. 2020, algorithm 1, with the empirical distributions of ``rows`` and the new row."""
    scores = []
    for row in new:
        every = np.vstack([rows, row])
        left = -np.log((every <= row).mean(axis=0))
        right = -np.log((every >= row).mean(axis=0))
        corrected = np.where(skew(rows) < 0, left, right)
        scores.append(max(left.sum(), right.sum(), corrected.sum()))
    return scores


def test_the_path_by_copod(manifest, inliers):
    detector = Path.fit(in_parts(inliers), definition("path", "copod"), manifest)
    fresh = simulated(images(40, seed=3) * np.linspace(0.9, 1, 40, dtype=np.float32)[:, None, None, None], seed=4)
    wanted = copod(paths(inliers, manifest), paths(fresh, manifest))
    assert detector.score(fresh) == pytest.approx(wanted, rel=0.1)
    assert np.corrcoef(detector.score(fresh), wanted)[0, 1] > 0.99


@pytest.mark.parametrize("method", ["mahalanobis", "copod"])
def test_a_path_outside_the_inliers_scores_higher_than_all_of_them(manifest, inliers, method):
    detector = Path.fit(in_parts(inliers), definition("path", method), manifest)
    far = replace(inliers, mean=inliers.mean + 1, loc=inliers.loc * 9, scale=inliers.scale * 9)
    assert detector.score(far).min() > detector.score(inliers).max()


# Latent.


def coded(codes: np.ndarray) -> Measured:
    return replace(simulated(images(len(codes))), loc=codes.astype(np.float32))


@pytest.mark.parametrize("n", [1, 3, 5, 200, 6 * 64, 2000])
def test_the_latent_density_is_by_the_nearest_neighbours(manifest, n):
    random = np.random.RandomState(0)
    reference, codes = (random.standard_normal((m, 5)).astype(np.float32) for m in (n, 30))
    detector = Latent.of(reference, definition("latent"), manifest)
    distances, _ = NearestNeighbors(n_neighbors=min(5, n)).fit(reference).kneighbors(codes)
    assert detector.score(coded(codes)) == pytest.approx(5 * np.log(distances.mean(axis=1)), rel=1e-4, abs=1e-4)


def test_the_nearest_of_many_are_found_wherever_they_lie_and_whatever_rows_are_beside(manifest):
    """Codes in order, so that all near ones are in one block; and each row as it is alone, bitwise."""
    random = np.random.RandomState(1)
    reference = np.sort(random.standard_normal((3000, 1)), axis=0) * np.ones(5)
    codes = (random.standard_normal((40, 1)) * np.ones(5)).astype(np.float32)
    detector = Latent.of(reference, definition("latent"), manifest)
    distances, _ = NearestNeighbors(n_neighbors=5).fit(reference.astype(np.float32)).kneighbors(codes)
    scores = detector.score(coded(codes))
    assert scores == pytest.approx(5 * np.log(distances.mean(axis=1)), rel=1e-4, abs=1e-4)
    assert np.array_equal(scores, np.concatenate([detector.score(coded(codes[i : i + 1])) for i in range(40)]))


@pytest.mark.parametrize("codes", [5, 70, 1000])
def test_what_lies_at_infinity_is_infinitely_far_and_of_nan_nothing_is_known(manifest, codes):
    random = np.random.RandomState(2)
    detector = Latent.of(random.standard_normal((codes, 5)), definition("latent"), manifest)
    rows = np.concatenate(
        [random.standard_normal((2, 5)), [[np.inf, 0, 0, 0, 0], [0, 0, -np.inf, 0, 0]], [[np.nan] * 5]]
    )
    scores = detector.score(coded(rows))
    assert np.array_equal(np.isfinite(scores), [True, True, False, False, False])
    assert list(scores[2:4]) == [np.inf, np.inf]
    assert np.isnan(scores[4])
    assert np.array_equal(scores[:2], detector.score(coded(rows[:2])))


def test_many_rows_are_held_against_many_codes_a_few_at_a_time(manifest, monkeypatch):
    random = np.random.RandomState(3)
    detector = Latent.of(random.standard_normal((200, 5)), definition("latent"), manifest)
    rows = coded(random.standard_normal((40, 5)))
    whole, held, kept = detector.score(rows), [], Neighbours._candidates
    monkeypatch.setattr(neighbours, "MOST_DISTANCES", 3 * 256)
    monkeypatch.setattr(Neighbours, "_candidates", lambda self, apart: held.append(len(apart)) or kept(self, apart))
    assert np.array_equal(detector.score(rows), whole)
    assert max(held) == 3


def test_the_latent_density_is_one_of_the_latent_space(manifest):
    """Codes c times as far apart are c^L times as thin."""
    random = np.random.RandomState(0)
    reference, codes = random.standard_normal((100, 5)), random.standard_normal((10, 5))
    near = Latent.of(reference, definition("latent"), manifest).score(coded(codes))
    far = Latent.of(8 * reference, definition("latent"), manifest).score(coded(8 * codes))
    assert far - near == pytest.approx(np.full(10, 5 * math.log(8)), rel=1e-4)


def test_codes_that_coincide_or_lie_at_the_end_of_float32_score_finitely(manifest):
    reference = np.zeros((6, 5))
    detector = Latent.of(reference, definition("latent"), manifest)
    scores = detector.score(coded(np.array([np.zeros(5), np.full(5, 1e-3), np.full(5, 3e38)])))
    assert np.isfinite(scores).all()
    assert (np.diff(scores) > 0).all()


# Residual.


def test_residuals_are_in_deviations_at_each_place(manifest, inliers):
    detector = Residual.fit(in_parts(inliers), definition("residual"), manifest)
    residual = inliers.x.astype(np.float64) - inliers.mean
    scale = np.sqrt(residual.var(axis=0) + residual.var(axis=0).mean())
    fresh = simulated(images(5, seed=6), seed=7)
    standardised = (fresh.x.astype(np.float64) - fresh.mean - residual.mean(axis=0)) / scale
    wanted = np.log((standardised**2).mean(axis=(1, 2, 3)))
    assert detector.score(fresh) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert np.exp(detector.score(fresh)).mean() == pytest.approx(0.5, abs=0.1)


def tabled(x: np.ndarray, seed: int) -> Measured:
    """A pass of vectors whose reconstruction errs by a tenth of their deviation."""
    measured = simulated(x.astype(np.float32))
    error = 0.1 * np.random.RandomState(seed).standard_normal(x.shape) * x.std(axis=0)
    return replace(measured, mean=(x - error).astype(np.float32))


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Manifest:
    return open_bundle(FAMILIES["table"].write(tmp_path_factory.mktemp("table"))).manifest


@pytest.mark.parametrize("units", [[1, 300, 0.02, 25], [1e-6, 1e6, 1, 1]])
def test_the_units_of_a_table_do_not_matter(table, units):
    random = np.random.RandomState(0)
    rows, new = random.standard_normal((60, 1, 1, 4)) + 1, random.standard_normal((9, 1, 1, 4)) + 1
    scale = np.array(units)
    plain = Residual.fit([tabled(rows, 1)], definition("residual"), table).score(tabled(new, 2))
    other = Residual.fit([tabled(rows * scale, 1)], definition("residual"), table).score(tabled(new * scale, 2))
    assert other == pytest.approx(plain, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("constant", [0.0, 7.0])
def test_a_number_of_a_table_that_never_changed_is_in_thousandths_of_its_size(table, constant):
    rows = np.random.RandomState(0).standard_normal((60, 1, 1, 4))
    rows[..., 2] = constant
    measured = tabled(rows, 1)
    scale = Residual.fit([measured], definition("residual"), table).arrays["scale"]
    assert scale[0, 0, 2] == pytest.approx(1e-3 * (constant or 1), rel=1e-5)
    assert scale[0, 0, 0] == pytest.approx(np.sqrt(2) * 0.1 * rows[..., 0].std(), rel=0.3)


def test_the_channels_of_a_signal_have_units_of_their_own(tmp_path):
    signals = open_bundle(FAMILIES["signals"].write(tmp_path)).manifest
    rows = np.random.RandomState(0).standard_normal((60, 2, 1, 6)) * np.array([1.0, 1e3])[:, None, None]
    rows[:, :, 0, 3] = 0  # a step that never changes takes its channel's deviation
    scale = Residual.fit([tabled(rows, 1)], definition("residual"), signals).arrays["scale"]
    assert np.allclose(scale[1] / scale[0], 1e3, rtol=0.5)
    assert (scale[:, 0, 3] > 0.05 * np.array([1.0, 1e3])).all()


# Statistics.


def test_statistics_are_judged_by_mahalanobis(manifest, inliers):
    detector = Statistics.fit(in_parts(inliers), definition("statistics"), manifest)
    rows = table_of(statistics, inliers, manifest)
    scale = rows.std(axis=0)
    covariance = np.linalg.inv(ledoit_wolf(rows / scale)[0] + 1e-6 * np.eye(rows.shape[1]))
    fresh = simulated(images(5, seed=6), seed=7)
    for row, score in zip(table_of(statistics, fresh, manifest), detector.score(fresh), strict=True):
        distance = mahalanobis(row / scale, rows.mean(axis=0) / scale, covariance)
        assert score == pytest.approx(math.log(distance**2 / rows.shape[1]), rel=1e-6)


# Combination.


@pytest.mark.parametrize("parts", [1, 3])
def test_a_combination_of_independent_parts_is_fisher_s(parts):
    """−log of a uniform probability is exponential, the sum of P of them gamma: on rows that nothing was fitted to."""
    random = np.random.RandomState(0)
    combination = Combination.fit(random.standard_normal((5000, parts)))
    fresh = random.standard_normal((2000, parts))
    scores = combination.score(list(fresh.T))
    assert kstest(scores, gamma(parts).cdf).pvalue > 0.01


def test_inside_the_scores_the_probability_is_a_share():
    scores = np.random.RandomState(1).permutation(np.arange(200.0))[:, None]
    surprisals = Combination.fit(scores).score([np.array([-5.0, 0, 50, 100, 179])])
    assert surprisals == pytest.approx(-np.log([1, 1, 150 / 200, 100 / 200, 21 / 200]))


def test_the_tail_is_exponential_beyond_the_90_percent_quantile():
    random = np.random.RandomState(0)
    slopes = []
    for _ in range(300):
        combination = Combination.fit(random.exponential(2.0, (60, 1)))
        far = combination.score([np.array([100.0, 101.0])])
        slopes.append(far[1] - far[0])
    # σ is the mean of 6 excesses of mean 2
    assert kstest(1 / np.array(slopes), gamma(6, scale=2 / 6).cdf).pvalue > 0.01
    exact = Combination.fit(expon(scale=2).ppf((np.arange(10**5) + 0.5) / 10**5)[:, None])
    probes = np.array([1.0, 4.0, 6.0, 30.0])
    assert exact.score([probes]) == pytest.approx(probes / 2, rel=0.01)


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(2, 60), st.just(2)), elements=st.sampled_from([0.0, 1.0, 2.5, -9.0]))
)
def test_tied_scores_count_all_that_are_as_high(scores):
    n = len(scores)
    combination = Combination.fit(scores)
    below = min(math.ceil(0.9 * n), n - 1)
    for index in range(2):
        for value in np.unique(np.sort(scores[:, index])[:below]):
            share = (scores[:, index] >= value).mean()
            assert combination.arrays["surprisals"][index][
                combination.arrays["knots"][index] == value
            ] == pytest.approx(-np.log(share))
    probes = np.linspace(-10, 5, 50)
    assert (np.diff(combination.score([probes, probes])) >= 0).all()


@pytest.mark.parametrize("value", [0.0, -400.0])
def test_a_part_that_never_changed_is_not_decided_by_rounding(value):
    combination = Combination.fit(np.full((50, 1), value))
    scores = combination.score([np.array([value, value * (1 + 1e-12) + 1e-12, value + 1.0])])
    assert np.isfinite(scores).all()
    assert scores[:2] == pytest.approx([0, 0], abs=1e-3)
    assert scores[2] > 1000


def test_many_scores_keep_few_knots():
    combination = Combination.fit(np.random.RandomState(0).standard_normal((3000, 2)))
    assert combination.arrays["knots"].shape == (2, 256)


# What a bundle may bring.


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> dict[str, np.ndarray]:
    """The arrays of a bundle of pictures, and its path under "path"."""
    root, family = tmp_path_factory.mktemp("fitted"), FAMILIES["pictures"]
    path = fit(family.write(root / "plain"), root, family.inliers(40, 1), family.inliers(30, 2))
    return {"path": path, **open_bundle(path).arrays(DETECTORS)}


def load(fitted: dict[str, np.ndarray], tmp_path, data: bytes) -> None:
    bundle = open_bundle(rewrite(open_bundle(fitted["path"]), tmp_path, {}, {DETECTORS: data}))
    load_detectors(bundle.manifest, detector_arrays(bundle))


def arrays_of(fitted: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in fitted.items() if name != "path"}


def test_what_was_fitted_loads(fitted, tmp_path):
    load(fitted, tmp_path, npz(arrays_of(fitted)))
    assert {name.split("/")[1] for name in arrays_of(fitted) if name.startswith("path/")} == {
        "quantiles",
        "loc",
        "scale",
        "whitening",
        "skewness",
    }


@pytest.mark.parametrize("score", ["typicality", "complexity", "debiased", "path", "latent", "residual", "combined"])
def test_a_missing_array_is_refused(fitted, tmp_path, score):
    gone = {name: array for name, array in arrays_of(fitted).items() if not name.startswith(f"{score}/")}
    with pytest.raises(BundleFormatError, match=r"detectors\.npz: a .* has \[\], expected"):
        load(fitted, tmp_path, npz(gone))


@pytest.mark.parametrize("key", ["elbo/mean", "other/mean", "mean", "", "path/loc/x", "path/more"])
def test_an_array_too_many_is_refused(fitted, tmp_path, key):
    with pytest.raises(BundleFormatError, match=r"detectors\.npz"):
        load(fitted, tmp_path, npz(arrays_of(fitted) | {key or "x": np.zeros(1)}))


KEYS = [
    "typicality/mean",
    "complexity/line",
    "debiased/best",
    "path/quantiles",
    "path/skewness",
    "path-copod/whitening",
    "latent/reference",
    "residual/mean",
    "residual/scale",
    "statistics/loc",
    "statistics/whitening",
    "combined/knots",
    "combined/surprisals",
    "combined/scale",
]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[None],
        lambda a: np.float64(1) if a.ndim else np.ones(2),
        lambda a: np.concatenate([a, a], axis=-1) if a.ndim else np.ones((1, 1)),
        lambda a: a[..., :0] if a.ndim else np.ones(0),
        lambda a: a.astype(np.int64),
        lambda a: a.astype(complex),
        lambda a: a.astype(">f8"),
        lambda a: a.astype("U"),
        lambda a: np.full_like(a, np.nan),
        lambda a: np.full_like(a, np.inf),
    ],
    ids=["axis", "scalar", "longer", "empty", "whole", "complex", "big-endian", "text", "nan", "inf"],
)
def test_a_foreign_array_is_refused(fitted, tmp_path, key, change):
    with pytest.raises(BundleFormatError, match=r"detectors\.npz"):
        load(fitted, tmp_path, npz(arrays_of(fitted) | {key: change(arrays_of(fitted)[key])}))


@pytest.mark.parametrize("key", ["path/scale", "residual/scale", "statistics/scale", "combined/scale"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_scale_that_is_not_positive_is_refused(fitted, tmp_path, key, value):
    array = arrays_of(fitted)[key].copy()
    array.flat[0] = value
    with pytest.raises(BundleFormatError, match="not positive"):
        load(fitted, tmp_path, npz(arrays_of(fitted) | {key: array}))


@pytest.mark.parametrize(
    ("key", "words"),
    [("path/quantiles", "does not rise"), ("combined/knots", "falls"), ("combined/surprisals", "falls")],
)
def test_numbers_out_of_order_are_refused(fitted, tmp_path, key, words):
    with pytest.raises(BundleFormatError, match=f"detectors.npz: .* {words} along its last axis"):
        load(fitted, tmp_path, npz(arrays_of(fitted) | {key: arrays_of(fitted)[key][:, ::-1]}))


@pytest.mark.parametrize(
    ("key", "shape"),
    [("latent/reference", (31, 5)), ("path/quantiles", (15, 258)), ("combined/knots", (3, 257))],
)
def test_more_than_is_of_use_is_refused(fitted, tmp_path, monkeypatch, key, shape):
    monkeypatch.setattr("service.scores.detectors.MOST_REFERENCE_NUMBERS", 30 * 5)
    huge = np.broadcast_to(np.linspace(0, 1, shape[1], dtype=np.float32), shape)
    with pytest.raises(BundleFormatError, match=r"has shape .* expected"):
        load(fitted, tmp_path, npz(arrays_of(fitted) | {key: huge}))


def test_knots_and_surprisals_of_other_lengths_are_refused(fitted, tmp_path):
    with pytest.raises(BundleFormatError, match="other surprisals than knots"):
        load(fitted, tmp_path, npz(arrays_of(fitted) | {"combined/knots": arrays_of(fitted)["combined/knots"][:, 1:]}))


def test_knots_too_far_apart_are_refused(fitted, tmp_path):
    knots = arrays_of(fitted)["combined/knots"].copy()
    knots[:, 0], knots[:, -1] = -1e308, 1e308
    with pytest.raises(BundleFormatError, match="further apart than float64 can tell"):
        load(fitted, tmp_path, npz(arrays_of(fitted) | {"combined/knots": knots}))


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{"typicality/mean": np.array([print, 1], object)})
    return buffer.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def claiming(shape: str) -> bytes:
    """An .npy whose header says more than it holds."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no archive",
        pickled(),
        zipped({"typicality/mean.npy": b"no array"}),
        zipped({"typicality/mean": b"text"}),
        zipped({"typicality/mean.npy": claiming("(1000000000000,)")}),
        zipped({"typicality/mean.npy": claiming("(-1,)")}),
        zipped({"typicality/mean.npy": claiming("()")}),
    ],
    ids=["empty", "text", "pickle", "member", "no-npy", "claims", "negative", "truncated"],
)
def test_a_hostile_archive_is_refused(fitted, tmp_path, data):
    with pytest.raises(BundleFormatError, match=r"detectors\.npz"):
        load(fitted, tmp_path, data)


def test_a_model_does_not_load_with_foreign_arrays(fitted, tmp_path, runtime):
    data = npz(arrays_of(fitted) | {"typicality/mean": np.array(np.nan)})
    path = rewrite(open_bundle(fitted["path"]), tmp_path, {}, {DETECTORS: data})
    with pytest.raises(BundleFormatError, match="mean of a typicality"):
        Model.load(open_bundle(path), runtime)


def test_a_path_of_another_family_is_refused(manifest, inliers):
    """As many norms as the model has: a bijection has μ alone."""
    definition_ = definition("path", "mahalanobis")
    arrays = Path.fit(in_parts(inliers), definition_, manifest).arrays
    for changes in (BIJECTION, NO_LIKELIHOOD):
        with pytest.raises(BundleFormatError, match="has shape"):
            Path(arrays, definition_, of_kind(manifest, **changes))


def test_every_fitted_estimator_has_its_class():
    assert set(CLASSES) | {"combination", "peak"} == FITTED, "a peak is the map's"

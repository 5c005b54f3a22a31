from __future__ import annotations

import itertools
import math
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import kstest

from service.bundle.files import open_bundle
from service.bundle.manifest import ScoreDefinition
from service.errors import BundleGraphError, InvalidInput, UnsupportedVerb
from service.inference import noise
from service.inference.model import Model
from service.scores import bounds as estimators
from tests.ppca_bundle import fit_ppca, graphs, images, write_ppca_bundle

X = images(45, seed=9)
Z = np.random.RandomState(5).standard_normal((45, 5)).astype(np.float32)
BATCHES = (2, 3, 5, 7, 8, 9, 17, 31, 32, 33, 45)


def definition(estimator: str = "elbo", k: int = 4, seed: int = 0) -> ScoreDefinition:
    return ScoreDefinition(estimator=estimator, k=k, seed=seed)


# The oracle: with an exact posterior every bound is log p(x).


@pytest.mark.parametrize("estimator", ["elbo", "iwae"])
@pytest.mark.parametrize("k", [1, 2, 5, 32, 33, 100])
@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 - 1])
def test_the_score_of_ppca_is_its_closed_form(model, ppca, estimator, k, seed):
    scores = model.score(X, definition(estimator, k, seed))
    wanted = ppca.log_likelihood(X)
    assert np.abs(scores.score + wanted).max() < 1e-4
    assert np.abs(scores.elbo - wanted).max() < 1e-4
    assert np.abs(scores.log_likelihood - wanted).max() < 1e-4
    assert scores.k == k


@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 6, 9)])
def test_the_oracle_holds_for_other_image_shapes(tmp_path, runtime, shape):
    path, ppca = write_ppca_bundle(tmp_path, shape=shape, latent_dim=3)
    x = images(9, shape, seed=4)
    model = Model.load(open_bundle(path), runtime)
    assert np.abs(model.score(x, definition(k=3)).score + ppca.log_likelihood(x)).max() < 1e-4
    assert np.array_equal(model.score(x).score, np.concatenate([model.score(row[None]).score for row in x]))


def test_the_default_score_is_the_manifest_s(model):
    assert np.array_equal(model.score(X[:3]).score, model.score(X[:3], model.manifest.scores["elbo"]).score)


# Memory.


def peak(work) -> int:
    """Bytes that numpy and Python held at most, beyond what stood before."""
    tracemalloc.start()
    work()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


@pytest.mark.parametrize("maps", [False, True])
def test_the_memory_of_a_score_is_that_of_one_part_whatever_the_batch(ppca_path, runtime, monkeypatch, maps):
    """MAX_ELEMENTS is 32 samples of 2 images: 32 images at once would take 16 times that."""
    monkeypatch.setattr("service.inference.model.graph_runners.MAX_ELEMENTS", 2 * 32 * 64)
    model = Model.load(open_bundle(ppca_path), runtime)
    x, k = images(32, seed=3), 64
    model.score(x[:2], definition(k=k))  # trials of batch sizes are over
    parts, weights = 8 * 2 * 32 * 64 * 4, 10 * 32 * k * 8
    assert peak(lambda: model.score(x, definition(k=k), maps)) < parts + weights + 2**16


def test_the_memory_of_an_encode_does_not_hold_the_images_once_a_chunk_of_samples(tmp_path, runtime):
    path, _ = write_ppca_bundle(tmp_path, shape=(1, 24, 24), latent_dim=1)
    model = Model.load(open_bundle(path), runtime)
    x = images(128, (1, 24, 24), seed=3)
    model.encode(x, samples=256)
    assert peak(lambda: model.encode(x, samples=256)) < 5 * x.nbytes


# Rate, distortion, maps and errors.


def test_the_elbo_is_minus_rate_and_distortion(model):
    scores = model.score(X, definition(k=7))
    assert np.allclose(scores.elbo, -(scores.rate + scores.distortion), rtol=0, atol=1e-9)


def test_the_rate_estimates_the_kl_divergence(model, ppca):
    """(1/k) Σ log q − log p(z) at sampled z against KL(q ‖ p) in closed form, within 5 of its standard errors."""
    gain, cholesky = ppca.posterior()
    loc = (X[:8].reshape(8, -1) - ppca.mean) @ gain.T
    kl = 0.5 * ((cholesky**2).sum() + (loc**2).sum(axis=1) - 5) - np.log(np.diag(cholesky)).sum()
    spread = np.sqrt((loc**2).sum(axis=1).max() * (cholesky**2).sum() + 5)
    assert np.abs(model.score(X[:8], definition(k=4000)).rate - kl).max() < 5 * spread / math.sqrt(4000)


def test_the_map_sums_to_the_distortion(model):
    scores = model.score(X, definition(k=40), maps=True)
    assert scores.map is not None
    assert (scores.map.shape, scores.map.dtype) == ((45, 8, 8), np.float32)
    assert np.allclose(scores.map.sum(axis=(1, 2), dtype=np.float64), scores.distortion, rtol=1e-5, atol=1e-4)
    assert model.score(X, definition()).map is None


def test_bits_per_dim_is_of_the_score_s_own_bound_for_8_bit_pixels(model):
    for estimator in ("elbo", "iwae"):
        scores = model.score(X, definition(estimator))
        assert np.allclose(scores.bits_per_dim, scores.score / (64 * math.log(2)) + 8, rtol=1e-12)
    assert estimators.bits_per_dim(np.array([-64 * math.log(2)]), 64, "counting").tolist() == [1.0]


def test_a_reconstruction_is_the_distortion_and_no_bound(model):
    elbo, scores = model.score(X, definition(k=7)), model.score(X, definition("reconstruction", 7))
    assert np.array_equal(scores.score, elbo.distortion)
    assert np.array_equal(scores.elbo, elbo.elbo)
    assert np.isnan(scores.bits_per_dim).all()


def test_the_standard_error_of_one_sample_is_nan(model):
    assert np.isnan(model.score(X, definition(k=1)).standard_error).all()


@pytest.mark.parametrize("estimator", ["elbo", "iwae"])
def test_the_standard_error_is_the_spread_of_the_bound(estimator):
    """Against 4000 repetitions on log-normal weights; 4% is over 3 errors of a standard deviation of 4000 numbers."""
    log_w = 0.5 * np.random.RandomState(0).standard_normal((4000, 200)) - 100
    bound = estimators.mean(log_w) if estimator == "elbo" else estimators.log_mean_exp(log_w)
    assert estimators.standard_error(log_w, estimator).mean() == pytest.approx(bound.std(), rel=0.04)


def test_the_standard_error_is_unbiased_at_small_k():
    log_w = np.random.RandomState(0).standard_normal((20_000, 3))
    errors = estimators.standard_error(log_w, "elbo")
    assert (errors**2).mean() == pytest.approx(1 / 3, rel=0.04)


def test_log_mean_exp_is_stable_and_exact():
    log_w = np.array([[-2000.0, -2000.0], [5000.0, 4990.0], [-np.inf, -np.inf], [-np.inf, 0.0]])
    wanted = logsumexp(log_w, axis=1) - np.log(2)
    assert np.allclose(estimators.log_mean_exp(log_w), wanted, rtol=1e-15, equal_nan=False)


def test_the_iwae_bound_rises_with_k_where_the_posterior_is_not_exact(tmp_path, runtime):
    """The decoder's noise is doubled behind the encoder's back, so q is wrong: elbo < iwae-k < iwae-k' ≤ log p(x)."""
    wrong = fit_ppca(images(400), 5)
    wrong = type(wrong)(wrong.weight * 2, wrong.mean, wrong.sigma, wrong.shape)

    def change(_manifest, files):
        files["decoder.onnx"] = graphs(wrong)["decoder"]

    path, _ = write_ppca_bundle(tmp_path, change=change)
    model = Model.load(open_bundle(path), runtime)
    bounds = [model.score(X, definition("iwae", k)).log_likelihood.mean() for k in (1, 8, 64, 512)]
    truth = wrong.log_likelihood(X).mean()
    assert all(low < high for low, high in itertools.pairwise(bounds))
    assert bounds[-1] < truth + 0.1
    assert model.score(X, definition("iwae", 64)).elbo.mean() < bounds[2]


# Rows are independent, bitwise, at every verb.


VERBS = {
    "encode": lambda m, s: m.encode(X[s], samples=3, seed=1),
    "encode 33 samples": lambda m, s: m.encode(X[s], samples=33),
    "encode without samples": lambda m, s: m.encode(X[s]),
    "decode": lambda m, s: (m.decode(Z[s]),),
    "observe": lambda m, s: (m.observe(Z[s], seed=3),),
    "reconstruct": lambda m, s: (m.reconstruct(X[s]),),
    "score by 1": lambda m, s: _arrays(m.score(X[s], definition(k=1))),
    "score by 4": lambda m, s: _arrays(m.score(X[s], definition(), maps=True)),
    "score by 50": lambda m, s: _arrays(m.score(X[s], definition("iwae", 50), maps=True)),
}


def _arrays(scores) -> list[np.ndarray]:
    return [value for value in scores if isinstance(value, np.ndarray)]


@pytest.mark.parametrize("verb", VERBS)
def test_rows_together_are_bitwise_rows_alone(model, verb):
    alone = [VERBS[verb](model, slice(i, i + 1)) for i in range(45)]
    for n in BATCHES:
        start = 45 - n
        together = VERBS[verb](model, slice(start, 45))
        for part, singles in zip(together, zip(*alone[start:], strict=True), strict=True):
            assert part.tobytes() == np.concatenate(singles).tobytes(), n


def test_threads_do_not_mix_each_other_s_rows(model):
    wanted = [model.score(X[i : i + 3]).score.tobytes() for i in range(40)]
    wrong: list[int] = []

    def work(offset: int) -> None:
        for i in range(40):
            place = (i + offset) % 40
            if model.score(X[place : place + 3]).score.tobytes() != wanted[place]:
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Latents.


def test_encode_gives_the_exact_posterior(model, ppca):
    gain, cholesky = ppca.posterior()
    posterior = model.encode(X, samples=2000, seed=11)
    assert np.allclose(posterior.loc, (X.reshape(45, -1) - ppca.mean) @ gain.T, atol=1e-6)
    assert np.allclose(posterior.scale, np.sqrt((cholesky**2).sum(axis=1)), atol=1e-6)
    centred = posterior.samples[0] - posterior.loc[0]
    assert kstest(np.linalg.solve(cholesky, centred.T).ravel(), "norm").pvalue > 0.01


def test_samples_of_a_larger_count_begin_with_those_of_a_smaller(model):
    few, many = model.encode(X[:2], samples=3, seed=4), model.encode(X[:2], samples=40, seed=4)
    assert few.samples.tobytes() == np.ascontiguousarray(many.samples[:, :3]).tobytes()
    assert model.encode(X[:2]).samples.shape == (2, 0, 5)
    assert not np.array_equal(few.samples, model.encode(X[:2], samples=3, seed=5).samples)


def test_decode_is_the_conditional_mean_and_reconstruct_goes_through_loc(model, ppca):
    assert np.allclose(model.decode(Z).reshape(45, -1), Z @ ppca.weight.T + ppca.mean, atol=1e-5)
    assert np.array_equal(model.reconstruct(X), model.decode(model.encode(X).loc))


def test_observe_draws_from_the_likelihood(model, ppca):
    draws = model.observe(np.repeat(Z[:1], 50, axis=0), seed=list(range(50)))
    residuals = (draws - model.decode(Z[:1])) / ppca.sigma
    assert kstest(residuals.ravel(), "norm").pvalue > 0.01
    assert np.array_equal(draws[7], model.observe(Z[:1], seed=7)[0])
    with pytest.raises(InvalidInput, match="2 seeds for 1 latents"):
        model.observe(Z[:1], seed=[1, 2])


def test_a_bundle_without_observation_says_so(tmp_path, runtime):
    def change(manifest, files):
        del manifest["graphs"]["observation"], files["observation.onnx"]

    path, _ = write_ppca_bundle(tmp_path, change=change)
    model = Model.load(open_bundle(path), runtime)
    model.warm_up()
    with pytest.raises(UnsupportedVerb, match="there is no observation graph"):
        model.observe(Z)


def test_sample_latents_are_the_prior_scaled_by_temperature(model):
    z = model.sample_latents(2000, seed=2)
    assert kstest(z.ravel(), "norm").pvalue > 0.01
    assert np.array_equal(z[:7], model.sample_latents(7, seed=2))
    assert np.array_equal(model.sample_latents(7, seed=2, temperature=0.5), z[:7] * np.float32(0.5))
    assert not model.sample_latents(7, temperature=0.0).any()


@pytest.mark.parametrize("mode", ["lerp", "slerp"])
def test_interpolation_starts_and_ends_exactly(model, mode):
    path = model.interpolate(Z[0], Z[1], steps=9, mode=mode)
    assert path.shape == (9, 5)
    assert np.array_equal(path[[0, -1]], Z[:2])
    assert np.allclose(path[::-1], model.interpolate(Z[1], Z[0], steps=9, mode=mode), atol=1e-6)


def test_lerp_is_straight_and_slerp_keeps_the_norm_and_a_steady_angle(model):
    a, b = Z[0] / np.linalg.norm(Z[0]), Z[1] / np.linalg.norm(Z[1])
    assert np.allclose(np.diff(model.interpolate(a, b, 5), axis=0), (b - a) / 4, atol=1e-6)
    arc = model.interpolate(a, b, 5, "slerp")
    assert np.allclose(np.linalg.norm(arc, axis=1), 1, atol=1e-6)
    assert np.allclose((arc[1:] * arc[:-1]).sum(axis=1), math.cos(math.acos(a @ b) / 4), atol=1e-6)


def test_slerp_at_its_edges(model):
    zero = np.zeros(5, np.float32)
    assert np.allclose(model.interpolate(Z[0], Z[0], 3, "slerp"), Z[0])
    assert np.allclose(model.interpolate(zero, Z[0], 3, "slerp")[1], Z[0] / 2)
    with pytest.raises(InvalidInput, match="opposite"):
        model.interpolate(Z[0], -Z[0], 3, "slerp")


# Input that is none.


def _with(value: float) -> np.ndarray:
    x = X[:3].copy()
    x[1, 0, 2, 2] = value
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[0], r"x has shape \(1, 8, 8\), expected \(N, 1, 8, 8\)"),
        (X[:0], "N ≥ 1"),
        (X[:, :, :7], r"expected \(N, 1, 8, 8\)"),
        ((X * 255).astype(np.int64), "dtype int64, expected float32"),
        ((X[0] * 255).astype(np.uint8), r"x has shape \(1, 8, 8\), expected \(N, 1, 8, 8\)"),
        (X.astype(object), "dtype object"),
        (X > 0.5, "dtype bool"),
        (_with(np.nan), "row 1: pixels span nan"),
        (_with(np.inf), "row 1"),
        (_with(-0.01), "row 1"),
        (_with(1.01), r"row 1.*expected finite numbers in \[0, 1\]"),
    ],
)
@pytest.mark.parametrize("verb", ["encode", "reconstruct", "score"])
def test_images_that_are_none_are_refused(model, verb, x, message):
    with pytest.raises(InvalidInput, match=message):
        getattr(model, verb)(x)


@pytest.mark.parametrize("verb", ["encode", "reconstruct", "score"])
def test_8_bit_levels_are_their_pixels(model, verb):
    levels = np.random.RandomState(0).randint(0, 256, (40, 1, 8, 8)).astype(np.uint8)
    of_levels, of_pixels = (getattr(model, verb)(x) for x in (levels, (levels / 255).astype(np.float32)))
    pairs = zip(of_levels, of_pixels, strict=True) if verb != "reconstruct" else [(of_levels, of_pixels)]
    arrays = [(a, b) for a, b in pairs if isinstance(a, np.ndarray)]
    assert arrays
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in arrays)


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (Z[0], r"z has shape \(5,\), expected \(M, 5\)"),
        (Z[:, :4], r"expected \(M, 5\)"),
        (Z[:0], "M ≥ 1"),
        (np.full((2, 5), np.nan, np.float32), "row 0: expected finite"),
        (np.array([[0.0] * 5, [1e300] * 5]), "row 1: expected finite float32"),
        (np.zeros((1, 5), np.int64), "dtype int64"),
    ],
)
@pytest.mark.parametrize("verb", ["decode", "observe"])
def test_latents_that_are_none_are_refused(model, verb, z, message):
    with pytest.raises(InvalidInput, match=message):
        getattr(model, verb)(z)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(X, samples=-1), "samples is -1"),
        (lambda m: m.encode(X, seed=-1), "seed is -1"),
        (lambda m: m.encode(X, seed=2**32), "seed is 4294967296"),
        (lambda m: m.encode(X, seed=True), "seed is True"),
        (lambda m: m.sample_latents(0), "n is 0"),
        (lambda m: m.sample_latents(1, temperature=-1.0), "temperature is -1"),
        (lambda m: m.sample_latents(1, temperature=math.nan), "temperature is nan"),
        (lambda m: m.sample_latents(1, temperature=1e300), "temperature is 1e\\+300"),
        (lambda m: m.interpolate(Z[0], Z[1], 1), "steps is 1"),
        (lambda m: m.interpolate(Z[0], Z[1], 3, "spline"), "mode is 'spline', expected lerp or slerp"),
        (lambda m: m.interpolate(Z[0], Z[1, :4], 3), "z has shape"),
    ],
)
def test_other_arguments_are_checked(model, call, message):
    with pytest.raises(InvalidInput, match=message):
        call(model)


def test_a_model_that_yields_nan_is_called_broken_not_the_image(tmp_path, runtime):
    def change(_manifest, files):
        broken = fit_ppca(images(400), 5)
        files["decoder.onnx"] = graphs(type(broken)(broken.weight, broken.mean * np.nan, broken.sigma, broken.shape))[
            "decoder"
        ]

    path, _ = write_ppca_bundle(tmp_path, change=change)
    with pytest.raises(BundleGraphError, match="NaN for row 0"):
        Model.load(open_bundle(path), runtime).score(X)


def test_warm_up_fixes_the_batch_sizes(model):
    model.warm_up()
    assert max(model.batch_sizes["decoder"]) == 32
    assert model.batch_sizes["density"] == (1,)  # its five latents are an odd number: sums start at odd addresses


# The streams are frozen: these numbers must never change, or scores of yesterday are not those of today.


def test_noise_streams_are_frozen():
    assert noise.posterior_noise(0, 2, 2).ravel().tolist() == [
        np.float32(value) for value in (1.764052345967664, 0.4001572083672233, 0.9787379841057392, 2.240893199201458)
    ]
    assert noise.prior_noise(0, 2, 2).tolist() == noise.posterior_noise(0, 2, 2).tolist()


def test_a_stream_begins_anew_whatever_the_thread_drew_before():
    """Normal numbers are drawn in pairs: of an odd count the second of a pair is left."""
    wanted = np.random.RandomState(7).standard_normal((3, 5)).astype(np.float32)
    for count in (0, 1, 2, 3):
        noise.prior_noise(11, 1, count)
        assert noise.prior_noise(7, 3, 5).tobytes() == wanted.tobytes()
    fresh = np.random.RandomState([7, noise.CHOICE]).randint(2**23, size=4)
    assert noise.prior_choice(7, 4).tolist() == ((fresh + 0.5) / 2**23).astype(np.float32).tolist()


def test_streams_of_several_threads_are_their_own():
    wanted = {seed: noise.prior_noise(seed, 50, 7).tobytes() for seed in range(8)}
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda seed: noise.prior_noise(seed % 8, 50, 7).tobytes(), range(2000)))
    assert found == [wanted[seed % 8] for seed in range(2000)]


def test_callers_seeds_do_not_fill_memory():
    """Arrays of 128 KB for 32 seeds: a few stay, not one a seed."""
    tracemalloc.start()
    for seed in range(32):
        noise.posterior_noise(seed, 1024, 32)
        noise.dither(seed, (1, 128, 256))
        noise.observation_noise(seed, (1, 128, 256), "uniform")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for cache in (noise.posterior_noise, noise.dither, noise.observation_noise):
        cache.cache_clear()
    assert held < 3 * 9 * 4 * 2**15


def test_uniform_noise_is_uniform_and_never_0_or_1():
    u = noise.dither(3, (1, 200, 200))
    assert kstest(u.ravel(), "uniform").pvalue > 0.01
    assert 0 < u.min() <= u.max() < 1
    extremes = (np.array([0.5, noise.RESOLUTION - 0.5]) / noise.RESOLUTION).astype(np.float32)
    assert (extremes > 0).all()
    assert (extremes < 1).all()


def test_streams_of_one_seed_differ():
    a, b = noise.dither(3, (1, 8, 8)), noise.observation_noise(3, (1, 8, 8), "uniform")
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.4
    with pytest.raises(ValueError, match="read-only"):
        a[0, 0, 0] = 1

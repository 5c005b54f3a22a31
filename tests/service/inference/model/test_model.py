"""The verbs of a model: rows are independent, bitwise, and each verb gives what it says."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
from scipy.stats import kstest

from service.bundle.files import open_bundle
from service.errors import InvalidInput, UnsupportedVerb
from service.inference.model import Model
from tests.ppca_bundle import images, write_ppca_bundle
from tests.service.inference.model.inputs import X, Z, definition, peak

BATCHES = (2, 3, 5, 7, 8, 9, 17, 31, 32, 33, 45)


def test_the_memory_of_an_encode_does_not_hold_the_images_once_a_chunk_of_samples(tmp_path, runtime):
    path, _ = write_ppca_bundle(tmp_path, shape=(1, 24, 24), latent_dim=1)
    model = Model.load(open_bundle(path), runtime)
    x = images(128, (1, 24, 24), seed=3)
    model.encode(x, samples=256)
    assert peak(lambda: model.encode(x, samples=256)) < 5 * x.nbytes


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


@pytest.mark.parametrize("verb", ["encode", "reconstruct", "score"])
def test_8_bit_levels_are_their_pixels(model, verb):
    levels = np.random.RandomState(0).randint(0, 256, (40, 1, 8, 8)).astype(np.uint8)
    of_levels, of_pixels = (getattr(model, verb)(x) for x in (levels, (levels / 255).astype(np.float32)))
    pairs = zip(of_levels, of_pixels, strict=True) if verb != "reconstruct" else [(of_levels, of_pixels)]
    arrays = [(a, b) for a, b in pairs if isinstance(a, np.ndarray)]
    assert arrays
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in arrays)


def test_warm_up_fixes_the_batch_sizes(model):
    model.warm_up()
    assert max(model.batch_sizes["decoder"]) == 32
    assert model.batch_sizes["joint"] == (1,)  # its five latents are an odd number: sums start at odd addresses

"""Piecewise linear functions, held against numpy's interpolation."""

import numpy as np
import pytest

from service.scores.piecewise_linear import CELLS, PiecewiseLinear


def made(kind: str, random: np.random.Generator) -> np.ndarray:
    knots = np.sort(random.standard_normal(int(random.integers(1, 257))))
    if kind == "coinciding":
        return np.sort(random.choice(knots, len(knots)))
    if kind == "crowded":  # nearly all of them in one cell
        return np.sort(np.exp(20 * knots))
    if kind == "tiny":
        return knots * 1e-300
    return knots * 1e6 if kind == "wide" else knots


@pytest.mark.parametrize("kind", ["spread", "coinciding", "crowded", "tiny", "wide"])
@pytest.mark.parametrize("seed", range(8))
def test_it_is_what_numpy_interpolates_and_a_slope_beyond(kind, seed):
    random = np.random.default_rng(seed)
    knots = made(kind, random)
    values = np.sort(random.random(len(knots)))
    at = [knots, np.nextafter(knots, np.inf), np.nextafter(knots, -np.inf), knots[:-1] + np.diff(knots) / 3]
    x = np.concatenate([*at, random.standard_normal(300) * knots.std() * 2, [np.inf, -np.inf]])
    beyond = np.maximum(x - knots[-1], 0) * 0.5
    found = PiecewiseLinear(knots, values, 0.5)(x)
    np.testing.assert_allclose(found, np.interp(x, knots, values) + beyond, rtol=1e-13, atol=1e-15)


def test_crowded_knots_are_told_apart_in_few_steps():
    """Not one step for each of the knots that share a cell."""
    found = PiecewiseLinear(np.append(np.linspace(0, 1e-9, 255), 1.0), np.arange(256.0), 1.0)
    assert len(found._steps) == 8
    assert found(np.array([0.5e-9]))[0] == pytest.approx(127, rel=1e-6)


def test_it_never_falls_and_each_number_has_its_own_answer():
    random = np.random.default_rng(0)
    found = PiecewiseLinear(np.sort(random.standard_normal(200)), np.sort(random.random(200)), 2.0)
    x = np.linspace(-4, 4, 10 * CELLS)
    assert (np.diff(found(x)) >= -1e-15).all()
    alone = [found(each)[0] for each in x[:500, None]]
    assert np.array_equal(found(x)[:500], alone)
    assert np.array_equal(found(x.reshape(10, -1)).ravel(), found(x))


@pytest.mark.parametrize(("x", "value"), [(np.nan, np.nan), (-np.inf, 3.0), (0.5, 3.0), (1.0, 3.0), (2.0, 5.0)])
def test_one_knot_and_what_is_no_number(x, value):
    given = np.array([x])
    assert np.array_equal(PiecewiseLinear(np.array([1.0]), np.array([3.0]), 2.0)(given), [value], equal_nan=True)
    assert np.array_equal(given, [x], equal_nan=True)  # what is asked for stays as it is

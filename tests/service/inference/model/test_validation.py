"""What no verb takes is refused in words."""

from __future__ import annotations

import math

import numpy as np
import pytest

from service.errors import InvalidInput
from tests.service.inference.model.inputs import X, Z


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

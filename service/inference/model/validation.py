"""Checks of what a verb is given: rows x, latents z, seeds, counts and temperatures."""

from __future__ import annotations

import numpy as np

from service.errors import InvalidInput
from service.pixels import unit_levels

MAX_TEMPERATURE = 1000


def checked_rows(x: np.ndarray, shape: tuple[int, int, int], are_images: bool) -> np.ndarray:
    """Rows x as float32 [N,*shape], N ≥ 1; images' 8-bit levels, uint8, as their pixels in [0, 1].

    Raises InvalidInput for another dtype or shape, for numbers that are not finite, and for pixels outside [0, 1].
    """
    are_levels = are_images and isinstance(x, np.ndarray) and x.dtype == np.uint8
    x = x if are_levels else _floats("x", x)
    if x.ndim != 4 or x.shape[1:] != shape or len(x) == 0:
        raise InvalidInput(f"x has shape {x.shape}, expected (N, {', '.join(map(str, shape))}) with N ≥ 1")
    if are_levels:
        return unit_levels(x)
    low, high = x.min(), x.max()  # NaN, if there is one
    if not (low >= 0.0 and high <= 1.0 if are_images else np.isfinite(low) and np.isfinite(high)):
        raise InvalidInput(_first_fault(x, are_images))
    return x


def checked_latents(z: np.ndarray, latent_dim: int) -> np.ndarray:
    """Latents z as float32 [M,latent_dim], M ≥ 1.

    Raises InvalidInput for another dtype or shape, and for numbers that are not finite.
    """
    z = _floats("z", z)
    if z.ndim != 2 or z.shape[1] != latent_dim or len(z) == 0:
        raise InvalidInput(f"z has shape {z.shape}, expected (M, {latent_dim}) with M ≥ 1")
    finite = np.isfinite(z).all(axis=1)
    if not finite.all():
        raise InvalidInput(f"z, row {int(np.argmin(finite))}: expected finite float32 numbers")
    return z


def checked_seed(seed: int) -> int:
    """The seed as a Python integer. Raises InvalidInput unless it is a whole number from 0 to 2³² − 1."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise InvalidInput(f"seed is {seed!r}, expected a whole number from 0 to 2³² − 1")
    return int(seed)


def check_count(name: str, value: int, least: int) -> None:
    """Raise InvalidInput, which names ``name``, unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InvalidInput(f"{name} is {value!r}, expected a whole number of at least {least}")


def check_temperature(temperature: float) -> None:
    """Raise InvalidInput unless the temperature is a number from 0 to MAX_TEMPERATURE."""
    if not 0 <= temperature <= MAX_TEMPERATURE:
        raise InvalidInput(f"temperature is {temperature}, expected a number from 0 to {MAX_TEMPERATURE}")


def _floats(name: str, value: np.ndarray) -> np.ndarray:
    """``value`` as float32. Raises InvalidInput where it is no array of floating-point numbers."""
    array = np.asarray(value)
    if array.dtype.kind != "f":
        raise InvalidInput(f"{name} has dtype {array.dtype}, expected float32")
    with np.errstate(over="ignore"):  # a float64 beyond float32's range becomes ∞, which the callers refuse
        return array.astype(np.float32, copy=False)


def _first_fault(x: np.ndarray, are_images: bool) -> str:
    """Say what is wrong with the first row of x that holds other numbers than finite ones, or than pixels."""
    for index, row in enumerate(x):
        low, high = row.min(), row.max()
        if are_images and not (low >= 0.0 and high <= 1.0):
            return f"x, row {index}: pixels span {low} to {high}, expected finite numbers in [0, 1]"
        if not (np.isfinite(low) and np.isfinite(high)):
            return f"x, row {index}: expected finite float32 numbers"
    raise AssertionError("called for rows with a fault")

"""Latents that no x leads to: noise of the prior, and paths from one latent to another."""

from __future__ import annotations

import math
from typing import cast

import numpy as np

from service.bundle.manifest import Manifest
from service.errors import InvalidInput
from service.inference import noise


def draw_prior_noise(manifest: Manifest, n: int, seed: int, temperature: float) -> np.ndarray:
    """The noise of n draws of the prior, float32 [n,P], or [n,P+1] where each draw chooses a component besides.

    P is the prior's ``noise_dim``, or L. ``temperature`` scales the deviation of the noise; the choice is left alone.
    """
    prior = manifest.prior
    noise_dim = prior.noise_dim or manifest.signature.latent_dim
    scaled = noise.prior_noise(seed, n, noise_dim) * np.float32(temperature)
    return np.column_stack([scaled, noise.prior_choice(seed, n)]) if prior.choice else scaled


def path_between(a: np.ndarray, b: np.ndarray, steps: int, mode: str) -> np.ndarray:
    """Latents from a to b, both float32 [L], ends included: float32 [steps,L].

    ``lerp`` goes straight, ``slerp`` along the great circle (Shoemake 1985).

    Raises InvalidInput for another mode, and for slerp between opposite latents, which no single great circle joins.
    """
    start, stop = a.astype(np.float64), b.astype(np.float64)
    t = np.linspace(0.0, 1.0, steps)[:, None]
    if mode not in ("lerp", "slerp"):
        raise InvalidInput(f"mode is {mode!r}, expected lerp or slerp")
    path = start + t * (stop - start) if mode == "lerp" else _slerp(start, stop, t)
    path[0], path[-1] = start, stop
    return path.astype(np.float32)


def _slerp(a: np.ndarray, b: np.ndarray, t: np.ndarray) -> np.ndarray:
    """sin((1−t)ω)/sin ω · a + sin(tω)/sin ω · b with ω the angle between a and b, [L] each; t is [steps,1]."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(np.clip(a @ b / norms, -1.0, 1.0)) if norms > 0 else 1.0
    omega = math.acos(cosine)
    if math.pi - omega < 1e-6:
        raise InvalidInput("slerp between opposite latents is undefined; use lerp")
    if omega < 1e-6:  # the formula's limit, and the only sensible path from or to the origin
        return a + t * (b - a)
    return cast(np.ndarray, (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / math.sin(omega))

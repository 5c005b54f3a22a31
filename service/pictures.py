"""Arrays -> pictures: PNG (one, or a grid), animated GIF and WebP, heat maps. The same arrays give the same bytes."""

from __future__ import annotations

import math
from io import BytesIO

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

GRID_GAP = 2
"""Pixels between the images of a grid."""
FRAME_MILLISECONDS = 120

# 33 evenly spaced colours of matplotlib's perceptually uniform map "inferno" (Smith and van der Walt, CC0), as hex RGB:
# with straight lines between them at most 2 of 256 levels away from the whole map.
_COLOURS = (
    "0000040403120b0724150b37210c4a2e0a5a3c09654a0c6b57106d63146e70196e7d1e6d89226a962766a32b61af315cbb3755"
    "c63e4dd14644db4f3be35932eb6528f1711ef67f14f98d0afb9c06fcab0ffbba1ff9ca32f5d949f2e865f3f586fcffa4"
)
INFERNO = np.frombuffer(bytes.fromhex(_COLOURS), np.uint8).reshape(-1, 3).astype(np.float64)


def to_levels(images: np.ndarray) -> np.ndarray:
    """Float images [N,C,H,W] in [0,1] -> uint8 [N,H,W,C], rounded to the nearest of 256 levels."""
    levels = np.floor(np.clip(images, 0, 1) * 255 + 0.5).astype(np.uint8)
    return levels.transpose(0, 2, 3, 1)


def grid(images: np.ndarray) -> np.ndarray:
    """uint8 [N,H,W,C] -> [H',W',C]: row by row, ceil(sqrt(N)) columns, GRID_GAP black pixels between; one as it is."""
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    step_y, step_x = height + GRID_GAP, width + GRID_GAP
    sheet = np.zeros((rows * step_y - GRID_GAP, columns * step_x - GRID_GAP, channels), np.uint8)
    for index, image in enumerate(images):
        y, x = (index // columns) * step_y, (index % columns) * step_x
        sheet[y : y + height, x : x + width] = image
    return sheet


def encode_png(images: np.ndarray) -> bytes:
    """Float images [N,C,H,W] in [0,1] -> one PNG, grey or RGB; a grid where N > 1."""
    return _save([grid(to_levels(images))], "PNG")


def encode_gif(images: np.ndarray) -> bytes:
    """Float images [N,C,H,W] in [0,1] -> an endless animated GIF; 256 colours a frame, equal neighbours are one."""
    # Whole palettes: of optimised grey ones Pillow 13 reads the later frames back in wrong levels.
    return _save(list(to_levels(images)), "GIF", optimize=False, duration=FRAME_MILLISECONDS, loop=0)


def encode_webp(images: np.ndarray) -> bytes:
    """Float images [N,C,H,W] in [0,1] -> an endless animated WebP, lossless."""
    return _save(list(to_levels(images)), "WEBP", lossless=True, duration=FRAME_MILLISECONDS, loop=0)


def encode_heat_maps(maps: np.ndarray) -> bytes:
    """Maps [N,H,W] in nats -> one PNG in the colours of "inferno"; a grid where N > 1.

    All maps share one scale, from the least to the largest value; the PNG's text entries ``minimum`` and ``maximum``
    (nats) give it.
    """
    low, high = float(maps.min()), float(maps.max())
    unit = (maps.astype(np.float64) - low) / (high - low) if high > low else np.zeros(maps.shape)
    stops = np.linspace(0, 1, len(INFERNO))
    colours = np.stack([np.interp(unit, stops, channel) for channel in INFERNO.T], axis=-1)
    text = PngInfo()
    text.add_text("minimum", repr(low))
    text.add_text("maximum", repr(high))
    return _save([grid(np.rint(colours).astype(np.uint8))], "PNG", pnginfo=text)


def _save(frames: list[np.ndarray], form: str, **options: object) -> bytes:
    """uint8 frames [H,W,C], C 1 or 3 -> a file."""
    pictures = [Image.fromarray(np.ascontiguousarray(f[..., 0] if f.shape[-1] == 1 else f)) for f in frames]
    if len(pictures) > 1:
        options |= {"save_all": True, "append_images": pictures[1:]}
    buffer = BytesIO()
    pictures[0].save(buffer, form, **options)
    return buffer.getvalue()

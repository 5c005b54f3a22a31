"""Arrays -> pictures: PNG (one, or a grid), animated GIF and WebP, heat maps. The same arrays give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from types import MappingProxyType

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

GRID_GAP = 2
"""Pixels between the images of a grid."""
FRAME_MILLISECONDS = 120
OPACITY = 0.75
"""Of the hottest places of an overlay: the image stays to be seen."""
NO_TEXT: Mapping[str, str] = MappingProxyType({})

Ends = tuple[float, float]
"""Values of the first and of the last colour."""

# 33 evenly spaced colours of matplotlib's perceptually uniform map "inferno" (Smith and van der Walt, CC0), as hex RGB:
# with straight lines between them at most 2 of 256 levels away from the whole map.
_COLOURS = (
    "0000040403120b0724150b37210c4a2e0a5a3c09654a0c6b57106d63146e70196e7d1e6d89226a962766a32b61af315cbb3755"
    "c63e4dd14644db4f3be35932eb6528f1711ef67f14f98d0afb9c06fcab0ffbba1ff9ca32f5d949f2e865f3f586fcffa4"
)
INFERNO = np.frombuffer(bytes.fromhex(_COLOURS), np.uint8).reshape(-1, 3).astype(np.float64)
_AT = np.linspace(0, len(INFERNO) - 1, 256)
COLOURS = np.rint(np.stack([np.interp(_AT, range(len(INFERNO)), each) for each in INFERNO.T], axis=-1)).astype(np.uint8)
"""The 256 colours of a heat map, uint8 [256,3]."""


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


def encode_heat_maps(maps: Sequence[np.ndarray], ends: Ends | None, text: Mapping[str, str] = NO_TEXT) -> bytes:
    """Maps [N,H,W] -> one PNG in the colours of "inferno", of whose ends ``ends`` are the values; a grid where N > 1.

    What lies beyond an end has its colour. The PNG's text entries ``minimum`` and ``maximum`` give the two values,
    ``text`` any further ones. Without ``ends``: the least and the largest value of these maps.
    """
    ends = ends or _ends_of(maps)
    return _save_coloured([_coloured(_unit(each, ends)) for each in maps], ends, text)


def encode_overlays(
    images: Sequence[np.ndarray], maps: Sequence[np.ndarray], ends: Ends | None, text: Mapping[str, str] = NO_TEXT
) -> bytes:
    """As ``encode_heat_maps``, each map [H,W] laid over its image [C,H',W'], C 1 or 3, uint8 or float in [0, 1].

    The higher a place, the less of the image shows through: all of it at the scale's low end, 1 − OPACITY at its high
    end. A map of another size than its image (of a backbone's features) is enlarged to it, bilinearly.
    """
    ends = ends or _ends_of(maps)
    pictures = []
    for image, each in zip(images, maps, strict=True):
        unit = _unit(_resized(each, *image.shape[1:]), ends)
        levels = image[None].transpose(0, 2, 3, 1) if image.dtype == np.uint8 else to_levels(image[None])
        opacity = OPACITY * unit[..., None]
        pictures.append(np.rint((1 - opacity) * levels[0] + opacity * _coloured(unit)).astype(np.uint8))
    return _save_coloured(pictures, ends, text)


def _coloured(unit: np.ndarray) -> np.ndarray:
    """[H,W] in [0, 1] -> RGB levels, uint8 [H,W,3]."""
    return COLOURS[np.rint(unit * (len(COLOURS) - 1)).astype(np.uint8)]


def _unit(values: np.ndarray, ends: Ends) -> np.ndarray:
    """Where between the ends, float32 in [0, 1]; 0 where both are one."""
    low, high = ends
    if not high > low:
        return np.zeros(values.shape, np.float32)
    return np.clip((values.astype(np.float64) - low) / (high - low), 0, 1).astype(np.float32)


def _ends_of(maps: Sequence[np.ndarray]) -> Ends:
    finite = [each[np.isfinite(each)] for each in maps]
    lows, highs = ([float(end(each)) for each in finite if each.size] for end in (np.min, np.max))
    return min(lows, default=0.0), max(highs, default=0.0)


def _resized(values: np.ndarray, height: int, width: int) -> np.ndarray:
    if values.shape == (height, width):
        return values
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))


def _save_coloured(pictures: Sequence[np.ndarray], ends: Ends, text: Mapping[str, str]) -> bytes:
    """uint8 [H,W,3] -> one PNG with the ends and ``text`` as its text entries."""
    entries = PngInfo()
    for name, value in {"minimum": repr(ends[0]), "maximum": repr(ends[1]), **text}.items():
        entries.add_text(name, value)
    return _save([grid(np.stack(pictures))], "PNG", pnginfo=entries)


def _save(frames: list[np.ndarray], form: str, **options: object) -> bytes:
    """uint8 frames [H,W,C], C 1 or 3 -> a file."""
    pictures = [Image.fromarray(np.ascontiguousarray(f[..., 0] if f.shape[-1] == 1 else f)) for f in frames]
    if len(pictures) > 1:
        options |= {"save_all": True, "append_images": pictures[1:]}
    buffer = BytesIO()
    pictures[0].save(buffer, form, **options)
    return buffer.getvalue()

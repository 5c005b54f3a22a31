"""Draw arrays as PNG (one image, or a grid), animated GIF or WebP, and heat maps; equal arrays give equal bytes."""

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
"""Time for which each frame of an animation is shown."""
OPACITY = 0.75
"""Opacity of an overlay where its map is highest, so that the image below can still be seen."""
NO_TEXT: Mapping[str, str] = MappingProxyType({})

ValueRange = tuple[float, float]
"""Values that the first and the last colour of a heat map stand for."""

# 33 evenly spaced colours of matplotlib's perceptually uniform map "inferno" (Smith and van der Walt, CC0), as hex RGB:
# with straight lines between them at most 2 of 256 levels away from the whole map.
_COLOURS = (
    "0000040403120b0724150b37210c4a2e0a5a3c09654a0c6b57106d63146e70196e7d1e6d89226a962766a32b61af315cbb3755"
    "c63e4dd14644db4f3be35932eb6528f1711ef67f14f98d0afb9c06fcab0ffbba1ff9ca32f5d949f2e865f3f586fcffa4"
)
INFERNO = np.frombuffer(bytes.fromhex(_COLOURS), np.uint8).reshape(-1, 3).astype(np.float64)
_POSITIONS = np.linspace(0, len(INFERNO) - 1, 256)
COLOURS = np.rint(
    np.stack([np.interp(_POSITIONS, range(len(INFERNO)), channel) for channel in INFERNO.T], axis=-1)
).astype(np.uint8)
"""The 256 colours of a heat map, uint8 [256,3]."""


def to_levels(images: np.ndarray) -> np.ndarray:
    """Convert float images [N,C,H,W] in [0,1] to levels, uint8 [N,H,W,C], rounded to the nearest of 256."""
    levels = np.floor(np.clip(images, 0, 1) * 255 + 0.5).astype(np.uint8)
    return levels.transpose(0, 2, 3, 1)


def grid(images: np.ndarray) -> np.ndarray:
    """Arrange images, uint8 [N,H,W,C], row by row in ceil(√N) columns with GRID_GAP black pixels between: [H',W',C]."""
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
    """Draw float images [N,C,H,W] in [0,1] as one PNG, grey or RGB; a grid if N > 1."""
    return _save([grid(to_levels(images))], "PNG")


def encode_gif(images: np.ndarray) -> bytes:
    """Draw float images [N,C,H,W] in [0,1] as an endless animated GIF of 256 colours a frame.

    Equal frames in a row become one that is shown longer.
    """
    # Palettes are not optimised, since Pillow 13 reads later frames with optimised grey palettes back in wrong levels.
    return _save(list(to_levels(images)), "GIF", optimize=False, duration=FRAME_MILLISECONDS, loop=0)


def encode_webp(images: np.ndarray) -> bytes:
    """Draw float images [N,C,H,W] in [0,1] as an endless animated WebP, lossless."""
    return _save(list(to_levels(images)), "WEBP", lossless=True, duration=FRAME_MILLISECONDS, loop=0)


def encode_heat_maps(
    maps: Sequence[np.ndarray], value_range: ValueRange | None, text: Mapping[str, str] = NO_TEXT
) -> bytes:
    """Draw maps [N,H,W] as one PNG in the colours of "inferno"; a grid if N > 1.

    Args:
        maps: values in any unit; infinities are allowed.
        value_range: values of the first and the last colour, which values beyond them have, too. None: the smallest and
            the largest finite value of the maps.
        text: text entries of the PNG, beside ``minimum`` and ``maximum``, which hold the range.
    """
    value_range = value_range or _finite_range(maps)
    return _save_coloured([_colour(_to_unit(values, value_range)) for values in maps], value_range, text)


def encode_overlays(
    images: Sequence[np.ndarray],
    maps: Sequence[np.ndarray],
    value_range: ValueRange | None,
    text: Mapping[str, str] = NO_TEXT,
) -> bytes:
    """Draw maps [H,W] over their images [C,H',W'] as one PNG in the colours of "inferno"; a grid if N > 1.

    The image shows through fully at the low end of the range, and by 1 − OPACITY at its high end. A map of another size
    than its image, as those of a backbone's features are, is enlarged to it bilinearly.

    Args:
        images: C 1 or 3, uint8 levels or float pixels in [0,1].
        maps, value_range, text: as ``encode_heat_maps`` has them.
    """
    value_range = value_range or _finite_range(maps)
    pictures = []
    for image, values in zip(images, maps, strict=True):
        unit = _to_unit(_resize(values, *image.shape[1:]), value_range)
        levels = image[None].transpose(0, 2, 3, 1) if image.dtype == np.uint8 else to_levels(image[None])
        opacity = OPACITY * unit[..., None]
        pictures.append(np.rint((1 - opacity) * levels[0] + opacity * _colour(unit)).astype(np.uint8))
    return _save_coloured(pictures, value_range, text)


def _colour(unit: np.ndarray) -> np.ndarray:
    """Map numbers [H,W] in [0,1] to RGB levels, uint8 [H,W,3]."""
    return COLOURS[np.rint(unit * (len(COLOURS) - 1)).astype(np.uint8)]


def _to_unit(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """Scale values linearly so that the range becomes [0,1], and clip them, float32; all 0 if the range is empty."""
    low, high = value_range
    if not high > low:
        return np.zeros(values.shape, np.float32)
    return np.clip((values.astype(np.float64) - low) / (high - low), 0, 1).astype(np.float32)


def _finite_range(maps: Sequence[np.ndarray]) -> ValueRange:
    """Return the smallest and the largest finite value of all maps; 0 and 0 if there is none."""
    finite = [values[np.isfinite(values)] for values in maps]
    lows, highs = ([float(extreme(values)) for values in finite if values.size] for extreme in (np.min, np.max))
    return min(lows, default=0.0), max(highs, default=0.0)


def _resize(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a map bilinearly to [height,width]; a map of that size is returned as it is."""
    if values.shape == (height, width):
        return values
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))


def _save_coloured(pictures: Sequence[np.ndarray], value_range: ValueRange, text: Mapping[str, str]) -> bytes:
    """Write pictures, uint8 [H,W,3], as one PNG with the range and ``text`` as its text entries."""
    entries = PngInfo()
    for name, value in {"minimum": repr(value_range[0]), "maximum": repr(value_range[1]), **text}.items():
        entries.add_text(name, value)
    return _save([grid(np.stack(pictures))], "PNG", pnginfo=entries)


def _save(frames: list[np.ndarray], format_name: str, **options: object) -> bytes:
    """Write frames, uint8 [H,W,C] with C 1 or 3, as a file of that format; several frames are an animation."""
    pictures = [Image.fromarray(np.ascontiguousarray(f[..., 0] if f.shape[-1] == 1 else f)) for f in frames]
    if len(pictures) > 1:
        options |= {"save_all": True, "append_images": pictures[1:]}
    buffer = BytesIO()
    pictures[0].save(buffer, format_name, **options)
    return buffer.getvalue()

"""Decode and resize images by a bundle's Preprocessing rule, in training and in serving alike: uint8 [C,H,W].

PNG, JPEG and WebP are read, nothing else. The first frame of an animation is taken. 16-bit grey is scaled to 8 bits
(rounded, not clipped; of 16-bit colour Pillow keeps the upper byte), palettes and CMYK are converted, alpha is
composited on ``background``, EXIF orientation is applied. An image that already has the target size is not resampled.
"""

from __future__ import annotations

import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from service.bundle.input_rules import Preprocessing
from service.errors import InvalidInput, PayloadTooLarge
from service.formats.containers import advise, check_container, check_exif
from service.formats.plain_png import read_plain_png
from service.formats.png_chunks import correct_transparency, has_nonzero_last_row, holds_all_rows
from service.formats.tiling import check_size
from service.pixels import unit_levels

FORMATS = ("PNG", "JPEG", "WEBP")
BAND = 2**18  # pixels that go from Pillow to an array at once
RESAMPLE = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
# The operation that turns an image upright, by EXIF orientation (TIFF 6.0, tag 274). Pillow's own exif_transpose would
# also rewrite the EXIF data, which are not used any more.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Exceptions that Pillow's decoders raise on damaged files, beside Pillow's own errors.
DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, struct.error, zlib.error)
MAX_ASPECT = 4096
"""Largest ratio of an image's aspect to the target's: beyond it, resizing would need absurd intermediate sizes."""
# 8-bit level of every 16-bit level: round(level / 257), as 65535 = 257 · 255.
_TO_8_BITS = ((np.arange(2**16) + 128) // 257).astype(np.uint8)

_WARNING_FILTERS = threading.Lock()


@dataclass(frozen=True)
class ImageLimits:
    """Limits on one encoded image: its bytes, and the pixels (width × height) that its header may claim."""

    max_bytes: int
    max_pixels: int


OWN_FILES = ImageLimits(max_bytes=256 * 2**20, max_pixels=150_000_000)
"""Limits on a user's own files, in training, scoring and calibrating alike: above what cameras make."""


def own_file_limits(max_bytes: int, max_pixels: int) -> ImageLimits:
    """Return OWN_FILES, or where they are larger the limits that the settings have for images of requests."""
    return ImageLimits(max(OWN_FILES.max_bytes, max_bytes), max(OWN_FILES.max_pixels, max_pixels))


def decode_image(data: bytes, preprocessing: Preprocessing, limits: ImageLimits, strict: bool = False) -> np.ndarray:
    """Decode the bytes of a PNG, JPEG or WebP into levels of the bundle's size, uint8 [C,H,W].

    Args:
        strict: refuse an image of another size than the bundle's instead of resizing it.

    Raises:
        PayloadTooLarge: the image exceeds ``limits``; pixels are judged by the header, before anything is decoded.
        InvalidInput: the bytes are no such image, are damaged, or have another size and ``strict`` is set.
    """
    return read_image(open_image(data, limits), preprocessing, strict)


def decode_whole_image(data: bytes, preprocessing: Preprocessing, limits: ImageLimits) -> np.ndarray:
    """Decode the bytes of a PNG, JPEG or WebP into levels of its own size, uint8 [C,h,w], for a model of tiles.

    Raises:
        PayloadTooLarge: the image exceeds ``limits``; pixels are judged by the header, before anything is decoded.
        InvalidInput: the bytes are no such image, are damaged, or the image is smaller than a tile.
    """
    return read_whole_image(open_image(data, limits), preprocessing)


ENTRIES_WITHOUT_ORIENTATION = frozenset({"aspect", "chromaticity", "dpi", "gamma", "srgb", "transparency"})
"""Entries of a PNG's ``info`` that hold no orientation. Reading the EXIF takes as long as decoding 28×28 pixels."""


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence Pillow's warnings of decompression bombs and bad EXIF, which the limits here replace by errors.

    The filters of warnings belong to the process, so that one thread at a time may change and restore them. Only
    headers are read under this lock; pixels are decoded in parallel.
    """
    with _WARNING_FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_image(data: bytes, limits: ImageLimits) -> Image.Image:
    """Open an image by its header; the pixels are decoded later, except for small plain PNGs.

    Raises:
        PayloadTooLarge: the image exceeds ``limits``.
        InvalidInput: the bytes are no PNG, JPEG or WebP, or the container is damaged.
    """
    if len(data) > limits.max_bytes:
        raise PayloadTooLarge(f"the image has {len(data)} bytes: at most {limits.max_bytes} expected")
    plain = read_plain_png(data)
    if plain is not None and plain.width * plain.height <= limits.max_pixels:
        return plain
    check_container(data)
    try:
        with _without_warnings():
            image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise PayloadTooLarge(f"the image claims too many pixels: at most {limits.max_pixels} expected") from error
    except (UnidentifiedImageError, *DECODER_ERRORS) as error:
        raise InvalidInput(f"no image: a PNG, JPEG or WebP file was expected{advise(data)}") from error
    width, height = image.size
    if width * height > limits.max_pixels:
        raise PayloadTooLarge(f"the image is {width}×{height}: at most {limits.max_pixels} pixels expected")
    check_exif(len(image.info.get("exif", b"")))
    return image


def read_image(image: Image.Image, preprocessing: Preprocessing, strict: bool = False) -> np.ndarray:
    """Decode an image from ``open_image`` into levels of the bundle's size, uint8 [C,H,W].

    Raises:
        InvalidInput: the pixels are damaged, or the size is another than the bundle's and ``strict`` is set.
    """
    return apply(_upright(image), preprocessing, strict)


def png_has_model_size(data: bytes, preprocessing: Preprocessing) -> bool:
    """True if the header of a PNG names the model's own size, so that it needs no resizing."""
    return data[16:24] == struct.pack(">II", preprocessing.width, preprocessing.height)


def read_png_of_model_size(data: bytes, preprocessing: Preprocessing) -> np.ndarray | None:
    """Decode a plain PNG of the model's mode and size into uint8 [C,H,W]; None for any other bytes, sound or not."""
    image = read_plain_png(data)
    if image is None or image.mode != preprocessing.mode or image.size != (preprocessing.width, preprocessing.height):
        return None
    return _levels(image)


def read_whole_image(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Decode an image from ``open_image`` into levels of its own size, uint8 [C,h,w], for a model of tiles.

    Raises:
        InvalidInput: the pixels are damaged, or the image is smaller than a tile.
    """
    planes = _planes(_convert(_upright(image), preprocessing))
    check_size(preprocessing, *planes.shape[1:])
    return planes


def _upright(image: Image.Image) -> Image.Image:
    """Decode an image and turn it as its EXIF orientation says. Raises InvalidInput for damaged pixels."""
    source = getattr(image, "fp", None)
    try:
        image.load()
    except (Image.DecompressionBombError, *DECODER_ERRORS) as error:
        raise InvalidInput(f"the {image.format} image is damaged or truncated") from error
    if image.format == "PNG" and isinstance(source, BytesIO):
        if not _has_all_rows(image, source):
            raise InvalidInput("the PNG image is damaged or truncated")
        correct_transparency(image, source.getvalue())
    if image.mode == "P" and image.palette is None:
        raise InvalidInput(f"the {image.format} image is damaged: its palette is missing")
    transpose = _transpose_of(image)
    return image if transpose is None else image.transpose(transpose)


def _has_all_rows(image: Image.Image, source: BytesIO) -> bool:
    """True if a PNG, decoded from ``source``, holds all its rows."""
    return has_nonzero_last_row(image) or holds_all_rows(source.getvalue())


def _transpose_of(image: Image.Image) -> Image.Transpose | None:
    """Return the operation that turns an image upright; None if there is none, or its EXIF cannot be read."""
    if image.format == "PNG" and image.info.keys() <= ENTRIES_WITHOUT_ORIENTATION:
        return None
    try:
        with _without_warnings():
            return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DECODER_ERRORS:
        return None


def apply(image: Image.Image, preprocessing: Preprocessing, strict: bool = False) -> np.ndarray:
    """Convert and resize an upright image by the rule to uint8 [C,H,W].

    Raises:
        InvalidInput: the size is another than the bundle's and ``strict`` is set, or the rule does not allow resizing.
    """
    size = (preprocessing.width, preprocessing.height)
    if image.size != size:
        _refuse_resizing(f"the image is {image.width}×{image.height}", preprocessing, strict)
    return _planes(_fit(_convert(image, preprocessing), preprocessing))


def resize_array(x: np.ndarray, preprocessing: Preprocessing, strict: bool = False) -> np.ndarray:
    """Resize images [N,C,h,w], uint8 levels or float32 pixels in [0,1], by the rule to [N,C,H,W] of the same dtype.

    Floats are resampled as floats, but an image whose floats are all 8-bit levels k/255 is resampled as levels, as the
    same image in a PNG is, so that it gives the same pixels in every format.

    Raises:
        InvalidInput: the number of channels is another, or the size is and ``strict`` is set.
    """
    channels, height, width = preprocessing.shape
    if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape:
        raise InvalidInput(f"images have shape {x.shape}: (N, {channels}, {height}, {width}) expected")
    if x.shape[2:] == (height, width):
        return x
    _refuse_resizing(f"images are {x.shape[3]}×{x.shape[2]}", preprocessing, strict)
    if x.dtype == np.uint8:
        return np.stack([_planes(_fit(_from_planes(image), preprocessing)) for image in x])
    return np.stack([_resize_floats(image, preprocessing) for image in x.astype(np.float32)])


def _refuse_resizing(actual: str, preprocessing: Preprocessing, strict: bool) -> None:
    """Raise InvalidInput if an image of another size must not be resized; ``actual`` begins the text."""
    size = f"{preprocessing.width}×{preprocessing.height}"
    if strict:
        raise InvalidInput(f"{actual}: {size} expected (strict)")
    if preprocessing.tiling is not None:
        raise InvalidInput(f"{actual}: {size} expected; this model is of tiles, and only score takes larger images")


def _resize_floats(planes: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Resize one image, float32 [C,h,w] in [0,1], to [C,H,W]."""
    levels = np.rint(planes * 255).astype(np.uint8)
    if (unit_levels(levels) == planes).all():
        return unit_levels(_planes(_fit(_from_planes(levels), preprocessing)))
    resized = [np.asarray(_fit(Image.fromarray(plane, "F"), preprocessing)) for plane in planes]
    return np.clip(np.stack(resized), 0, 1)


def _convert(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Convert an image to mode L or RGB, with 16-bit grey scaled and transparency composited on the background.

    Raises:
        InvalidInput: the palette or the transparency does not fit the pixels.
    """
    try:
        return _convert_unchecked(image, preprocessing)
    except DECODER_ERRORS as error:
        raise InvalidInput("the image is damaged: its palette or its transparency does not fit") from error


def _convert_unchecked(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _from_16_bits(image, preprocessing.background)
    if image.has_transparency_data:
        grey = (preprocessing.background,) * 3
        backdrop = Image.new("RGBA", image.size, (*grey, 255))
        image = Image.alpha_composite(backdrop, image.convert("RGBA")).convert("RGB")
    if image.mode == preprocessing.mode:
        return image
    if image.mode not in {"L", "RGB"}:
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image.convert(preprocessing.mode)


def _from_16_bits(image: Image.Image, background: int) -> Image.Image:
    """Convert grey of modes I, I;16 and F, levels 0 to 65535, to mode L; a transparent level becomes the background."""
    levels = np.asarray(image)
    if levels.dtype != np.uint16:
        levels = np.rint(np.clip(levels, 0, 65535)).astype(np.uint16)
    grey = _TO_8_BITS[levels]
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[levels == transparent] = background
    return Image.fromarray(grey)


def _fit(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resize an image to the rule's size by the rule's fit. Raises InvalidInput for a shape too far from it."""
    size = (preprocessing.width, preprocessing.height)
    if image.size == size:
        return image
    ratio = (image.width / image.height) / (size[0] / size[1])
    if not 1 / MAX_ASPECT <= ratio <= MAX_ASPECT:
        raise InvalidInput(f"the image is {image.width}×{image.height}: its shape is too far from {size[0]}×{size[1]}")
    method = RESAMPLE[preprocessing.resample]
    if preprocessing.fit == "stretch":
        return image.resize(size, method)
    if preprocessing.fit == "cover":
        return ImageOps.fit(image, size, method)
    return _contain(image, size, method, preprocessing.background)


def _contain(image: Image.Image, size: tuple[int, int], method: Image.Resampling, background: int) -> Image.Image:
    """Pad an image to ``size`` as ImageOps.pad does, but with sides of at least one pixel."""
    scale = min(size[0] / image.width, size[1] / image.height)
    inner = [max(1, round(side * scale)) for side in image.size]
    grey = float(unit_levels(np.array(background)))
    colour = grey if image.mode == "F" else (background,) * len(image.getbands())
    sheet = Image.new(image.mode, size, colour)
    offset = [round((outer - side) / 2) for outer, side in zip(size, inner, strict=True)]
    sheet.paste(image.resize((inner[0], inner[1]), method), (offset[0], offset[1]))
    return sheet


def _planes(image: Image.Image) -> np.ndarray:
    """Copy an image in mode L or RGB into uint8 [C,H,W], contiguous.

    It is copied a band of rows at a time: Pillow gives pixels as bytes, two more copies of what is read at once.
    """
    width, height = image.size
    rows = max(1, BAND // width)
    if rows >= height:
        return np.array(_levels(image), order="C")
    planes = np.empty((len(image.getbands()), height, width), np.uint8)
    for top in range(0, height, rows):
        planes[:, top : top + rows] = _levels(image.crop((0, top, width, min(top + rows, height))))
    return planes


def _levels(image: Image.Image) -> np.ndarray:
    """View an image in mode L or RGB as uint8 [C,H,W], read-only and with channels last in memory."""
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, -1).transpose(2, 0, 1)


def _from_planes(planes: np.ndarray) -> Image.Image:
    """Make an image in mode L or RGB from uint8 [C,H,W], C 1 or 3."""
    return Image.fromarray(planes[0] if len(planes) == 1 else np.ascontiguousarray(planes.transpose(1, 2, 0)))

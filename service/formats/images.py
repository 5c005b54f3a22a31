"""Any image becomes uint8 [C,H,W] by the bundle's Preprocessing rule: the one place, for training and for serving.

PNG, JPEG and WebP are read, nothing else. Of an animation the first frame counts. 16-bit grey is scaled to 8 bits
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
from service.formats.containers import check_container, check_exif
from service.formats.plain_png import read_plain_png
from service.formats.png_rows import holds_all_rows, shows_its_last_row
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
# EXIF orientation -> what turns the image upright (TIFF 6.0, tag 274). Pillow's exif_transpose also rewrites the EXIF.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise on damaged files, beside its own errors.
DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, struct.error, zlib.error)
MAX_ASPECT = 4096
"""An image is refused if one side is so many times the other: resizing it would ask for absurd intermediate sizes."""
# 16-bit levels -> 8 bits: round(level / 257), as 65535 = 257 · 255.
_TO_8_BITS = ((np.arange(2**16) + 128) // 257).astype(np.uint8)

_FILTERS = threading.Lock()


@dataclass(frozen=True)
class ImageLimits:
    """Most bytes of one encoded image, and most pixels (width × height) that its header may claim."""

    max_bytes: int
    max_pixels: int


def decode_image(data: bytes, preprocessing: Preprocessing, limits: ImageLimits, strict: bool = False) -> np.ndarray:
    """The bytes of a PNG, JPEG or WebP -> uint8 [C,H,W].

    Raises:
        PayloadTooLarge: more bytes or pixels than ``limits`` (pixels by the header, before anything is decoded).
        InvalidInput: no such image, or damaged; or another size than the bundle's and ``strict``.
    """
    return read_image(open_image(data, limits), preprocessing, strict)


def decode_whole(data: bytes, preprocessing: Preprocessing, limits: ImageLimits) -> np.ndarray:
    """The bytes of a PNG, JPEG or WebP -> uint8 [C,h,w] in its own size, for a model of tiles.

    Raises as ``decode_image``; InvalidInput for an image that is smaller than a tile.
    """
    return read_whole(open_image(data, limits), preprocessing)


UNTURNED = frozenset({"aspect", "chromaticity", "dpi", "gamma", "srgb", "transparency"})
"""What Pillow may know of a PNG that does not turn it: to ask takes as long as to decode 28×28 pixels."""


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Pillow's warnings of bombs and bad EXIF: our limits decide, in words.

    The filters of warnings belong to the process, so one thread at a time may change them and put them back; only
    headers are read in here, decoding stays parallel.
    """
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_image(data: bytes, limits: ImageLimits) -> Image.Image:
    """The image by its header: its size is known, its pixels are not decoded yet unless they are few.

    Raises:
        PayloadTooLarge: more bytes or pixels than ``limits``.
        InvalidInput: no PNG, JPEG or WebP, or its container is damaged.
    """
    if len(data) > limits.max_bytes:
        raise PayloadTooLarge(f"the image has {len(data)} bytes: at most {limits.max_bytes} expected")
    plain = read_plain_png(data)
    if plain is not None and plain.width * plain.height <= limits.max_pixels:
        return plain
    check_container(data)
    try:
        with _quietly():
            image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise PayloadTooLarge(f"the image claims too many pixels: at most {limits.max_pixels} expected") from error
    except (UnidentifiedImageError, *DECODER_ERRORS) as error:
        raise InvalidInput("no image: a PNG, JPEG or WebP file was expected") from error
    width, height = image.size
    if width * height > limits.max_pixels:
        raise PayloadTooLarge(f"the image is {width}×{height}: at most {limits.max_pixels} pixels expected")
    check_exif(len(image.info.get("exif", b"")))
    return image


def read_image(image: Image.Image, preprocessing: Preprocessing, strict: bool = False) -> np.ndarray:
    """Decode what ``open_image`` opened -> uint8 [C,H,W].

    Raises:
        InvalidInput: its pixels are damaged; or another size than the bundle's and ``strict``.
    """
    return apply(_upright(image), preprocessing, strict)


def is_of_natural_size(data: bytes, preprocessing: Preprocessing) -> bool:
    """Whether a PNG has the rule's own size, by its header."""
    return data[16:24] == struct.pack(">II", preprocessing.width, preprocessing.height)


def read_natural(data: bytes, preprocessing: Preprocessing) -> np.ndarray | None:
    """uint8 [C,H,W] of a plain PNG that has the rule's own mode and size; None of all else, sound or not."""
    image = read_plain_png(data)
    if image is None or image.mode != preprocessing.mode or image.size != (preprocessing.width, preprocessing.height):
        return None
    return _levels(image)


def read_whole(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Decode what ``open_image`` opened -> uint8 [C,h,w] in its own size, for a model of tiles.

    Raises:
        InvalidInput: its pixels are damaged; or it is smaller than a tile.
    """
    found = _planes(_convert(_upright(image), preprocessing))
    check_size(preprocessing, *found.shape[1:])
    return found


def _upright(image: Image.Image) -> Image.Image:
    """Decoded and turned as its EXIF says. Raises InvalidInput for damaged pixels."""
    source = getattr(image, "fp", None)
    try:
        image.load()
    except (Image.DecompressionBombError, *DECODER_ERRORS) as error:
        raise InvalidInput(f"the {image.format} image is damaged or truncated") from error
    if image.format == "PNG" and isinstance(source, BytesIO) and not _has_all_rows(image, source):
        raise InvalidInput("the PNG image is damaged or truncated")
    if image.mode == "P" and image.palette is None:
        raise InvalidInput(f"the {image.format} image is damaged: its palette is missing")
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _has_all_rows(image: Image.Image, source: BytesIO) -> bool:
    """Of a decoded PNG, and the file that it was decoded from."""
    return shows_its_last_row(image) or holds_all_rows(source.getvalue())


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns the image upright; EXIF data that cannot be read says nothing, as everywhere else."""
    if image.format == "PNG" and image.info.keys() <= UNTURNED:
        return None
    try:
        with _quietly():
            return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DECODER_ERRORS:
        return None


def apply(image: Image.Image, preprocessing: Preprocessing, strict: bool = False) -> np.ndarray:
    """A Pillow image, upright -> uint8 [C,H,W] by the rule. Raises InvalidInput if strict and of another size."""
    size = (preprocessing.width, preprocessing.height)
    if image.size != size:
        _refuse_resizing(f"the image is {image.width}×{image.height}", preprocessing, strict)
    return _planes(_fit(_convert(image, preprocessing), preprocessing))


def resize_array(x: np.ndarray, preprocessing: Preprocessing, strict: bool = False) -> np.ndarray:
    """Arrays [N,C,h,w], uint8 or float32 in [0,1] -> [N,C,H,W] of the same dtype, by the same rule.

    Floats are resampled as floats; but an image whose floats all are 8-bit levels (k/255) is resampled as such, as the
    same image in a PNG is: it gives the same pixels in every format.

    Raises:
        InvalidInput: another number of channels; or another size and ``strict``.
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


def _refuse_resizing(found: str, preprocessing: Preprocessing, strict: bool) -> None:
    size = f"{preprocessing.width}×{preprocessing.height}"
    if strict:
        raise InvalidInput(f"{found}: {size} expected (strict)")
    if preprocessing.tiling is not None:
        raise InvalidInput(f"{found}: {size} expected; this model is of tiles, and only score takes larger images")


def _resize_floats(planes: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """float32 [C,h,w] -> [C,H,W]."""
    levels = np.rint(planes * 255).astype(np.uint8)
    if (unit_levels(levels) == planes).all():
        return unit_levels(_planes(_fit(_from_planes(levels), preprocessing)))
    resized = [np.asarray(_fit(Image.fromarray(plane, "F"), preprocessing)) for plane in planes]
    return np.clip(np.stack(resized), 0, 1)


def _convert(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """To mode L or RGB: 16-bit grey scaled, transparency composited on the background.

    Raises InvalidInput for a palette or a transparency that does not fit the pixels.
    """
    try:
        return _converted(image, preprocessing)
    except DECODER_ERRORS as error:
        raise InvalidInput("the image is damaged: its palette or its transparency does not fit") from error


def _converted(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
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
    """Grey of modes I, I;16 and F with levels to 65535 -> mode L; a transparent level becomes the background."""
    levels = np.asarray(image)
    if levels.dtype != np.uint16:
        levels = np.rint(np.clip(levels, 0, 65535)).astype(np.uint16)
    grey = _TO_8_BITS[levels]
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[levels == transparent] = background
    return Image.fromarray(grey)


def _fit(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
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
    """As ImageOps.pad, but a side never shrinks to nothing."""
    scale = min(size[0] / image.width, size[1] / image.height)
    inner = [max(1, round(side * scale)) for side in image.size]
    grey = float(unit_levels(np.array(background)))
    colour = grey if image.mode == "F" else (background,) * len(image.getbands())
    sheet = Image.new(image.mode, size, colour)
    offset = [round((outer - side) / 2) for outer, side in zip(size, inner, strict=True)]
    sheet.paste(image.resize((inner[0], inner[1]), method), (offset[0], offset[1]))
    return sheet


def _planes(image: Image.Image) -> np.ndarray:
    """A Pillow image in mode L or RGB -> uint8 [C,H,W], contiguous.

    A band of rows at a time: Pillow hands out pixels by way of bytes, which of a whole image would be two more copies.
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
    """As ``_planes``, read-only, in the order in which Pillow gives them."""
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, -1).transpose(2, 0, 1)


def _from_planes(planes: np.ndarray) -> Image.Image:
    """uint8 [C,H,W] with C 1 or 3 -> a Pillow image in mode L or RGB."""
    return Image.fromarray(planes[0] if len(planes) == 1 else np.ascontiguousarray(planes.transpose(1, 2, 0)))

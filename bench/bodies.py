"""Every input format of the service as (Content-Type, body) of the same uint8 images [N,C,H,W], or latents [N,L]."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import numpy as np
import orjson
from PIL import Image

Body = tuple[str, bytes]
BOUNDARY = "boundary-of-the-benchmark"


def _npy(array: np.ndarray) -> Body:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return "application/x-npy", buffer.getvalue()


def _unit(pixels: np.ndarray) -> np.ndarray:
    """Float32 pixels in [0, 1]."""
    return (pixels / np.float32(255)).astype(np.float32)


def _png(image: np.ndarray) -> bytes:
    """One image [C,H,W] as a PNG file, greyscale or RGB."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, "png")
    return buffer.getvalue()


def _multipart(pixels: np.ndarray) -> Body:
    head = 'Content-Disposition: form-data; name="images"; filename="{}.png"\r\nContent-Type: image/png\r\n\r\n'
    parts = [head.format(index).encode() + _png(image) for index, image in enumerate(pixels)]
    body = b"".join(b"--" + BOUNDARY.encode() + b"\r\n" + part + b"\r\n" for part in parts)
    return f"multipart/form-data; boundary={BOUNDARY}", body + f"--{BOUNDARY}--\r\n".encode()


def _json_numbers(pixels: np.ndarray) -> Body:
    return "application/json", orjson.dumps({"images": _unit(pixels)}, option=orjson.OPT_SERIALIZE_NUMPY)


def _json_base64(pixels: np.ndarray) -> Body:
    return "application/json", orjson.dumps({"images": [base64.b64encode(_png(image)).decode() for image in pixels]})


FORMATS: dict[str, Callable[[np.ndarray], Body]] = {
    "octet-stream": lambda pixels: ("application/octet-stream", pixels.tobytes()),
    "npy uint8": _npy,
    "npy float32": lambda pixels: _npy(_unit(pixels)),
    "png": lambda pixels: ("image/png", _png(pixels[0])),
    "multipart png": _multipart,
    "json base64": _json_base64,
    "json numbers": _json_numbers,
}
ONE_IMAGE = frozenset({"png"})  # formats that hold a single image
COMMON = ("octet-stream", "npy uint8", "png", "multipart png", "json numbers")
"""Those that are measured unless all are asked for; a batch of PNG files is multipart."""
LATENT_FORMATS: dict[str, Callable[[np.ndarray], Body]] = {
    "npy float32": _npy,
    "json numbers": lambda z: ("application/json", orjson.dumps({"latents": z}, option=orjson.OPT_SERIALIZE_NUMPY)),
}

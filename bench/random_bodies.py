"""Random bodies of requests: images, rows and latents in every input format, odd ones and bad ones among them."""

from __future__ import annotations

import base64
import functools
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.bodies import BOUNDARY
from bench.models import synthetic_images
from tests.hostile import odd_but_good, payloads, table_payloads

JSON, NPY, OCTETS = "application/json", "application/x-npy", "application/octet-stream"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"
Shape = tuple[int, int, int]
Body = tuple[str, str, bytes]
"""(format, Content-Type, bytes)"""
IMAGE_FORMATS = {
    "octets": 18, "npy": 18, "json numbers": 12, "json base64": 8, "png": 14, "jpeg": 5, "webp": 2, "multipart": 8,
    "hostile": 16, "odd": 7,
}  # fmt: skip
ROW_FORMATS = {"npy": 30, "json rows": 30, "json objects": 10, "csv": 20, "hostile": 10}
LATENT_FORMATS = {"npy": 50, "json latents": 40, "octets": 3, "hostile": 20}
SHARE_BAD = 0.05
"""Of parameters, of arrays and of the like: how many are wrong on purpose."""


@dataclass(frozen=True)
class Model:
    """What requests need to know of a bundle."""

    name: str
    version: str
    kind: str
    shape: Shape
    natural: tuple[int, ...]
    latent_dim: int
    scores: tuple[str, ...]
    features: tuple[str, ...]
    is_tiled: bool


def read_models(folder: Path) -> list[Model]:
    """Of every NAME/VERSION/manifest.json, by name and version."""
    return [_model(json.loads(path.read_text())) for path in sorted(folder.glob("*/*/manifest.json"))]


def _model(manifest: dict[str, Any]) -> Model:
    signature, rule = manifest["signature"], manifest["preprocessing"]
    kind = rule.get("kind", "image")
    return Model(
        manifest["name"],
        manifest["version"],
        kind,
        tuple(signature["shape"]),
        tuple(signature["shape"] if kind == "image" else rule["natural"]),
        signature["latent_dim"],
        tuple(manifest["scores"]),
        tuple(rule.get("features") or ()),
        bool(rule.get("tiling")),
    )


class Bodies:
    """Draws bodies, and all other choices, from a seed."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.arrays = np.random.RandomState(self.random.getrandbits(32))

    def of(self, weights: dict[Any, int]) -> Any:
        return self.random.choices(list(weights), list(weights.values()))[0]

    def is_bad(self) -> bool:
        return self.random.random() < SHARE_BAD

    def body(self, verb: str, method: str, model: Model) -> Body:
        """What the verb reads of that model."""
        if verb == "sample":
            return (
                ("json parameters", JSON, b"{}")
                if method == "POST" and self.random.random() < 0.5
                else ("none", "", b"")
            )
        n = self.of({1: 60, 2: 12, 3: 10, 8: 13, 64: 5})
        if verb == "interpolate":
            n = 2 if self.random.random() < 0.9 else n
        if verb == "decode" or (verb == "interpolate" and self.random.random() < 0.4):
            return self.latents(model, n, verb)
        return self.images(model, n, verb) if model.kind == "image" else self.rows(model, n, verb)

    def images(self, model: Model, n: int, verb: str) -> Body:
        """Images in one of the formats."""
        form = self.of(IMAGE_FORMATS)
        if form in ("hostile", "odd"):
            return self.hostile(form, model, verb)
        if form == "octets":
            return self.octets(model, n)
        if form in ("png", "jpeg", "webp"):
            if verb == "interpolate" and not self.is_bad():
                return self.images(model, n, verb)  # it wants two
            n = 1
        pixels = self.pixels(model, min(n, 3) if model.is_tiled else n)
        made: dict[str, Callable[[np.ndarray], tuple[str, bytes]]] = {
            "npy": lambda pixels: (NPY, self.npy(self.laid_out(pixels))),
            "json numbers": lambda pixels: (JSON, self.json_numbers(pixels)),
            "json base64": lambda pixels: (JSON, self.json_base64(pixels)),
            "multipart": lambda pixels: (MULTIPART, self.multipart(pixels)),
        }
        if form in made:
            return form, *made[form](pixels)
        return form, f"image/{form}", self.cut(self.picture(pixels[0], form))

    def octets(self, model: Model, n: int) -> Body:
        """uint8 in the model's shape."""
        body = self.pixels(model, n, model.shape[1:]).tobytes()
        return "octets", OCTETS, body[:-1] if self.is_bad() else body

    def pixels(self, model: Model, n: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """uint8 [n,C,h,w]: noise or soft blobs, mostly of the model's own size."""
        height, width = model.shape[1:]
        if size is None and (model.is_tiled or self.random.random() < 0.2):
            height, width = (self.random.randint(1 if self.is_bad() else 8, 48) for _ in range(2))
        if self.random.random() < 0.3:
            return self.arrays.randint(0, 256, (n, model.shape[0], height, width)).astype(np.uint8)
        images = synthetic_images((model.shape[0], max(height, 2), max(width, 2)), n, self.arrays.randint(2**31))
        images = images[:, :height, :width]
        return images[:, None] if model.shape[0] == 1 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))

    def numbers(self, values: np.ndarray, kinds: dict[str, int]) -> np.ndarray:
        """As one of the dtypes; uint8 levels become fractions where that holds floats. Some hold what they must not."""
        dtype = np.dtype(self.of(kinds))
        if values.dtype == np.uint8 and dtype.kind == "f":
            values = values / 255
        values = values.astype(dtype)
        if dtype.kind == "f" and self.is_bad():
            values.flat[self.arrays.randint(values.size)] = self.random.choice([np.nan, np.inf, -0.5, 1.5, 1e-40])
        return values

    def laid_out(self, pixels: np.ndarray) -> np.ndarray:
        """An array of images in one of the natural shapes, dtypes and orders."""
        array = self.numbers(pixels, {"u1": 40, "<f4": 25, "<f8": 10, "<f2": 8, ">f4": 5, "<i8": 4, "?": 3, "<c8": 2})
        shapes = [lambda a: a, lambda a: a.transpose(0, 2, 3, 1), lambda a: a[0], lambda a: a[0].transpose(1, 2, 0)]
        shapes += [lambda a: a[:, 0], lambda a: a[0, 0], lambda a: a[None], lambda a: a[:0]]
        array = self.random.choices(shapes, [50, 12, 10, 5, 15, 6, 1, 1])[0](array)
        return np.asfortranarray(array) if self.random.random() < 0.1 else np.ascontiguousarray(array)

    def npy(self, array: np.ndarray) -> bytes:
        """An npy file, of version 2.0 now and then."""
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, self.random.choices([(1, 0), (2, 0)], [9, 1])[0])
        return self.cut(buffer.getvalue())

    def json_numbers(self, pixels: np.ndarray) -> bytes:
        """Nested lists of levels, of fractions, or with something else among them."""
        document: dict[str, Any] = {"images": pixels.tolist(), "dtype": "uint8"}
        if self.random.random() < 0.7:
            document = {"images": (pixels / np.float32(255)).astype(np.float32).tolist()}
        if self.random.random() < 0.2:
            document["images"] = [image[0] for image in document["images"]]
        if self.is_bad():
            odd = self.random.choice([True, "1", None, 300, -1, 0.5, [], 10**20, float("nan")])
            self.innermost(document["images"])[0] = odd
        return json.dumps(document).encode()

    @staticmethod
    def innermost(values: list[Any]) -> list[Any]:
        """The first list in it that holds no list."""
        while isinstance(values[0], list):
            values = values[0]
        return values

    def json_base64(self, pixels: np.ndarray) -> bytes:
        """A list of files."""
        forms = [self.random.choice(["png", "png", "jpeg", "npy"]) for _ in pixels]
        files = [
            self.npy(image) if form == "npy" else self.picture(image, form)
            for image, form in zip(pixels, forms, strict=True)
        ]
        texts = [base64.b64encode(self.cut(file)).decode() for file in files]
        if self.random.random() < 0.2:
            texts[0] = f"data:image/png;base64,{texts[0]}"
        single = len(texts) == 1 and self.random.random() < 0.3
        return json.dumps({"images": texts[0] if single else texts}).encode()

    def multipart(self, pixels: np.ndarray) -> bytes:
        """A form of files."""
        parts = []
        for image in pixels[:8]:
            form = self.random.choice(["png", "png", "jpeg", "npy"])
            file = self.npy(image) if form == "npy" else self.picture(image, form)
            field = "other" if self.random.random() < 0.02 else "images"
            head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="a.{form}"\r\n\r\n'
            parts.append(head.encode() + file + b"\r\n")
        return self.cut(b"".join(parts) + f"--{BOUNDARY}--\r\n".encode())

    def picture(self, image: np.ndarray, form: str) -> bytes:
        """An image [C,h,w] as a file in one of the modes that the format has."""
        picture = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
        modes = {
            "png": ["L", "RGB", "RGBA", "LA", "P", "1", "I;16"],
            "jpeg": ["L", "RGB", "CMYK"],
            "webp": ["RGB", "RGBA"],
        }
        if self.random.random() < 0.4:
            picture = picture.convert(self.random.choice(modes[form]))
        options: dict[str, Any] = {}
        if form == "jpeg":
            options = {"quality": self.random.choice([30, 75, 95]), "progressive": self.random.random() < 0.3}
            exif = Image.Exif()
            exif[0x0112] = self.random.choice([1, 1, 3, 6, 8])  # orientation
            options["exif"] = exif.tobytes()
        if form == "png":
            options = {"optimize": self.random.random() < 0.3, "compress_level": self.random.choice([0, 6])}
        buffer = io.BytesIO()
        picture.save(buffer, form, lossless=True, **options) if form == "webp" else picture.save(
            buffer, form, **options
        )
        return buffer.getvalue()

    def cut(self, file: bytes) -> bytes:
        """The file, now and then damaged: cut, or with one byte that is another."""
        if self.random.random() > 0.04 or len(file) < 4:
            return file
        at = self.random.randrange(len(file))
        return file[:at] if self.random.random() < 0.5 else file[:at] + bytes([file[at] ^ 0x55]) + file[at + 1 :]

    def rows(self, model: Model, n: int, verb: str) -> Body:
        """Vectors or signals in one of the formats."""
        form = self.of(ROW_FORMATS)
        if form == "hostile" and model.features:
            return self.hostile("table", model, verb)
        values = self.numbers(
            self.arrays.standard_normal((n, *model.natural)), {"<f4": 50, "<f8": 40, "<f2": 5, "<i8": 5}
        )
        if form == "npy":
            return form, NPY, self.npy(values if self.random.random() < 0.8 else values[0])
        if form == "csv":
            lines = [",".join(map(str, row.ravel().tolist())) for row in values]
            head = (
                [",".join(f'"{name}"' for name in model.features)]
                if model.features and self.random.random() < 0.6
                else []
            )
            return form, "text/csv", self.cut("\r\n".join([*head, *lines, ""]).encode())
        rows: list[Any] = values.tolist()
        if form == "json objects" and model.features:
            rows = [dict(zip(model.features, row, strict=True)) for row in rows]
        return form, JSON, json.dumps({"rows": rows}).encode()

    def latents(self, model: Model, n: int, verb: str) -> Body:
        """Latents in one of the formats."""
        form = self.of(LATENT_FORMATS)
        if form == "hostile":
            return self.hostile(form, model, verb)
        width = model.latent_dim + self.is_bad()
        z = self.numbers(self.arrays.standard_normal((n, width)), {"<f4": 60, "<f8": 25, "<f2": 10, "u1": 5})
        if form == "octets":
            return form, OCTETS, z.tobytes()
        z = z if n > 1 or self.random.random() < 0.7 else z[0]
        if form == "npy":
            return form, NPY, self.npy(z)
        return form, JSON, json.dumps({"latents": z.tolist()}).encode()

    def hostile(self, form: str, model: Model, verb: str) -> Body:
        """A body of tests/hostile.py; mostly one that is meant for this verb."""
        bodies = _hostile(form, model)
        fitting = [body for body in bodies if body.verb == verb]
        payload = self.random.choice(fitting if fitting and self.random.random() < 0.8 else bodies)
        return form, payload.content_type, payload.body


@functools.lru_cache(maxsize=64)
def _hostile(form: str, model: Model) -> list[Any]:
    if form == "table":
        return list(table_payloads(list(model.features)))
    if form == "odd":
        return list(odd_but_good(model.shape))
    is_picture = model.shape[0] in (1, 3) and min(model.shape[1:]) >= 4
    return list(payloads(model.shape if is_picture else (1, 8, 8), model.latent_dim))

"""Request bodies to pixels: every format ends in the same float32 numbers, and every hostile body in our own errors."""

from __future__ import annotations

import base64
import json
import tracemalloc
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.bundle.input_rules import Preprocessing
from service.errors import InvalidInput, LimitExceeded, PayloadTooLarge, UnsupportedMediaType
from service.formats.arrays import parse_json
from service.formats.codecs import Limits, Reader, encode_npy, read_latents
from service.formats.images import ImageLimits
from service.formats.media_types import INPUTS, media_type
from tests import hostile
from tests.hostile import FORM, JPEG, JSON, NPY, OCTETS, PNG, WEBP, X_FORM, levels, npy, part, pil, saved

SHAPES = [(1, 16, 16), (3, 16, 16), (1, 8, 12), (3, 12, 8)]
LIMITS = Limits(1024, ImageLimits(2**24, 2**24), 2**27, 2**26)


def rule(shape: hostile.Shape, **options: Any) -> Preprocessing:
    return Preprocessing(mode="L" if shape[0] == 1 else "RGB", height=shape[1], width=shape[2], **options)


def read(shape: hostile.Shape, kind: str, body: bytes, limits: Limits = LIMITS, strict: bool = False) -> np.ndarray:
    return Reader(rule(shape), limits, strict).read(kind, body, lambda: parse_json(body))


def as_json(images: Any, **fields: Any) -> bytes:
    return json.dumps({"images": images, **fields}).encode()


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def bodies(pixels: np.ndarray) -> dict[str, tuple[str, bytes]]:
    """One image, uint8 [C,H,W], in every format that loses nothing."""
    image = pil_of(pixels)
    file, unit = saved(image, "PNG"), (pixels / np.float32(255))[None]
    return {
        "png": (PNG, file),
        "webp": (WEBP, saved(image, "WEBP", lossless=True)),
        "form": (X_FORM, part(file) + b"--x--\r\n"),
        "form of npy": (X_FORM, part(npy(pixels)) + b"--x--\r\n"),
        "npy uint8": (NPY, npy(pixels)),
        "npy float32": (NPY, npy(unit)),
        "npy float64": (NPY, npy(unit.astype(np.float64))),
        "npy float64 of k/255": (NPY, npy(pixels / 255)),
        "npy big-endian": (NPY, npy(unit.astype(">f4"))),
        "npy Fortran": (NPY, npy(np.asfortranarray(unit))),
        "npy channels last": (NPY, npy(np.ascontiguousarray(unit.transpose(0, 2, 3, 1)))),
        "json of k/255": (JSON, as_json((pixels / 255)[None].tolist())),
        "json of float32": (JSON, as_json(unit.tolist())),
        "json uint8": (JSON, as_json(pixels[None].tolist(), dtype="uint8")),
        "json base64 png": (JSON, as_json([in_base64(file)])),
        "json base64 npy": (JSON, as_json([in_base64(npy(pixels))])),
        "json data URL": (JSON, as_json([f"data:image/png;base64,{in_base64(file)}"])),
        "octets": (OCTETS, pixels.tobytes()),
    }


def pil_of(pixels: np.ndarray) -> Any:
    image = pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
    return hostile.Image.fromarray(image)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_format_gives_the_same_bits(shape):
    """All 256 levels, in float32: k/255 rounded once."""
    pixels = (np.arange(np.prod(shape)) % 256).astype(np.uint8).reshape(shape)
    expected = (pixels.astype(np.float64) / 255).astype(np.float32)[None]
    for name, (kind, body) in bodies(pixels).items():
        pixels_read = read(shape, kind, body)
        assert pixels_read.dtype == np.float32, name
        assert pixels_read.flags.c_contiguous, name
        assert np.array_equal(pixels_read, expected), name


@pytest.mark.parametrize("fit", ["cover", "contain", "stretch"])
def test_every_format_is_resized_alike(fit):
    pixels = levels((3, 20, 33))
    reader = Reader(rule((3, 8, 8), fit=fit, background=77), LIMITS)
    resized = {
        name: reader.read(kind, body, lambda body=body: parse_json(body))
        for name, (kind, body) in bodies(pixels).items()
        if name != "octets"
    }
    assert resized["png"].shape == (1, 3, 8, 8)
    assert [name for name, x in resized.items() if not np.array_equal(x, resized["png"])] == []


def test_jpeg_is_read_alike_wherever_it_is():
    shape, data = (3, 16, 16), saved(pil((3, 16, 16)), "JPEG")
    ways = [(JPEG, data), (PNG, data), (X_FORM, part(data) + b"--x--\r\n"), (JSON, as_json(in_base64(data)))]
    assert len({read(shape, kind, body).tobytes() for kind, body in ways}) == 1


def test_many_images_keep_their_order():
    shape = (1, 8, 8)
    images = [levels(shape, seed) for seed in range(5)]
    expected = np.stack(images) / np.float32(255)
    files = [saved(pil_of(image), "PNG") for image in images]
    mixed = [files[0], npy(images[1]), files[2], npy(np.stack(images[3:]))]
    for kind, body in [
        (NPY, npy(np.stack(images))),
        (OCTETS, np.stack(images).tobytes()),
        (JSON, as_json([(image / 255).tolist() for image in images])),
        (JSON, as_json([in_base64(data) for data in mixed])),
        (X_FORM, b"".join(part(data) for data in mixed) + b"--x--\r\n"),
    ]:
        assert np.array_equal(read(shape, kind, body), expected), kind


def test_json_lists_of_mixed_sizes():
    """Each image by itself goes through the rule, as its file would."""
    large, small = levels((1, 20, 30)), levels((1, 8, 8), 1)
    together = read((1, 8, 8), JSON, as_json([large.tolist(), small.tolist()], dtype="uint8"))
    apart = [read((1, 8, 8), PNG, saved(pil_of(image), "PNG")) for image in (large, small)]
    assert np.array_equal(together, np.concatenate(apart))
    flat = read((1, 8, 8), JSON, as_json([large[0].tolist(), small[0].tolist()], dtype="uint8"))
    assert np.array_equal(flat, together)


def test_json_names_the_image_that_is_wrong():
    valid = levels((1, 8, 8))[0].tolist()
    with pytest.raises(InvalidInput, match="image 1: numbers in nested lists"):
        read((1, 8, 8), JSON, as_json([valid, [["a"] * 8] * 8]))
    with pytest.raises(InvalidInput, match="image 1: "):
        read((1, 8, 8), JSON, as_json([valid, [[300] * 8] * 8], dtype="uint8"))
    with pytest.raises(InvalidInput, match="image 1: no image"):
        read((1, 8, 8), JSON, as_json([in_base64(saved(pil((1, 8, 8)), "PNG")), in_base64(b"hello")]))


def test_floats_are_never_rescaled_by_a_guess():
    x = np.full((1, 1, 8, 8), 200.0, np.float32)
    with pytest.raises(InvalidInput, match="image 0: pixels as float32 from 0 to 1 expected"):
        read((1, 8, 8), NPY, npy(x))
    dark = np.ones((1, 1, 8, 8), np.uint8)
    assert (read((1, 8, 8), NPY, npy(dark)) == np.float32(1 / 255)).all()
    assert (read((1, 8, 8), NPY, npy(dark.astype(np.float32))) == 1).all()
    assert (read((1, 8, 8), JSON, as_json(dark.tolist())) == 1).all()
    assert (read((1, 8, 8), JSON, as_json(dark.tolist(), dtype="uint8")) == np.float32(1 / 255)).all()


def test_strict_refuses_what_would_be_resized():
    for kind, body in [(PNG, saved(pil((1, 9, 8)), "PNG")), (NPY, npy(levels((1, 9, 8))))]:
        assert read((1, 8, 8), kind, body).shape == (1, 1, 8, 8)
        with pytest.raises(InvalidInput, match="8×9: 8×8 expected"):
            read((1, 8, 8), kind, body, strict=True)
    assert read((1, 9, 8), PNG, saved(pil((1, 9, 8)), "PNG"), strict=True).shape == (1, 1, 9, 8)


@pytest.mark.parametrize("kind", ["IMAGE/PNG", "image/png; q=1", " image/png ;charset=x"])
def test_media_types_are_read_as_http_means_them(kind):
    assert media_type(kind) == "image/png"
    assert read((1, 8, 8), kind, saved(pil((1, 8, 8)), "PNG")).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("kind", ["image/jpg", "image/pjpeg", "image/x-png", "image/apng", "Image/JPG; charset=binary"])
def test_other_names_of_image_types(kind):
    assert read((1, 8, 8), kind, saved(pil((1, 8, 8)), "PNG")).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("kind", "usual"), [("application/npy", NPY), ("application/x-numpy", NPY), ("text/json", JSON)]
)
def test_other_names_of_array_types(kind, usual):
    x = levels((1, 8, 8))
    body = npy(x) if usual == NPY else as_json(x.tolist(), dtype="uint8")
    assert np.array_equal(read((1, 8, 8), kind, body), read((1, 8, 8), usual, body))


BASE64 = {
    "standard": lambda data: in_base64(data),
    "line breaks": lambda data: base64.encodebytes(data).decode(),
    "CRLF": lambda data: base64.encodebytes(data).replace(b"\n", b"\r\n").decode(),
    "blanks around": lambda data: f"  {in_base64(data)}\n",
    "URL-safe": lambda data: base64.urlsafe_b64encode(data).decode(),
    "no padding": lambda data: in_base64(data).rstrip("="),
    "URL-safe, no padding": lambda data: base64.urlsafe_b64encode(data).decode().rstrip("="),
    "data URL": lambda data: f"data:image/png;base64,{in_base64(data)}",
    "data URL in capitals": lambda data: f"DATA:image/PNG;BASE64,{in_base64(data)}",
    "data URL of parameters": lambda data: f"data:image/png;name=a.png;base64,{in_base64(data)}",
    "data URL, line breaks": lambda data: f"data:image/png;base64,{base64.encodebytes(data).decode()}",
    "data URL, percent-coded": lambda data: f"data:image/png;base64,{quote(in_base64(data), safe='')}",
    "data URL, URL-safe, no padding": lambda data: (
        f"data:;base64,{base64.urlsafe_b64encode(data).decode().rstrip('=')}"
    ),
}


@pytest.mark.parametrize("length", range(4))
@pytest.mark.parametrize("name", BASE64)
def test_base64_as_clients_write_it(name, length):
    """Of every length modulo 3, with both characters that the alphabets differ in."""
    data = saved(pil((1, 8, 8)), "PNG") + bytes([0xFB, 0xFF, 0xFE] * 9)[: 24 + length]
    assert any(letter in in_base64(data) for letter in "+/")
    assert np.array_equal(read((1, 8, 8), JSON, as_json([BASE64[name](data)])), read((1, 8, 8), PNG, data))


@pytest.mark.parametrize("text", ["a", "aGVs=bG8=", "====", "a*bc", "é" * 8, "b'aGVs'", "aGVs|bG8"])
def test_what_is_no_base64_is_refused(text):
    with pytest.raises(InvalidInput, match=r"image 0: base64 of a PNG, JPEG, WebP or npy file expected, or a data URL"):
        read((1, 8, 8), JSON, as_json([text]))


def test_an_unknown_type_names_those_that_are_read():
    with pytest.raises(UnsupportedMediaType, match="application/octet-stream"):
        read((1, 8, 8), "text/plain", b"x")
    with pytest.raises(UnsupportedMediaType, match="application/x-npy, application/json"):
        read_latents("image/png", b"x", lambda: None, 5, 10)


# Latents


def test_latents():
    z = np.random.RandomState(0).standard_normal((3, 5))
    expected = z.astype(np.float32)
    for kind, body in [
        (NPY, npy(z)),
        (NPY, npy(expected)),
        (NPY, npy(np.asfortranarray(z.astype(">f8")))),
        (JSON, json.dumps({"latents": z.tolist()}).encode()),
    ]:
        latents = read_latents(kind, body, lambda body=body: parse_json(body), 5, 3)
        assert latents.dtype == np.float32
        assert np.array_equal(latents, expected)
    assert read_latents(NPY, npy(z[0]), lambda: None, 5, 1).shape == (1, 5)
    with pytest.raises(LimitExceeded, match="3 latents: at most 2 here"):
        read_latents(NPY, npy(z), lambda: None, 5, 2)


def test_npy_answers_can_be_sent_back():
    for array in (levels((1, 8, 8)), np.asfortranarray(np.eye(3)), np.zeros((0, 4), np.float32)):
        data = encode_npy(array)
        assert np.array_equal(np.load(hostile.io.BytesIO(data)), array)
        assert encode_npy(array) == data


# Limits


def small_limits(**options: int) -> Limits:
    return Limits(3, ImageLimits(2**20, 2**20), **{"max_pixels": 2**27, "max_numbers": 2**26, **options})


@pytest.mark.parametrize("count", [3, 4])
def test_too_many_images_in_any_format(count):
    image = levels((1, 8, 8))
    file, numbers = saved(pil_of(image), "PNG"), (image[0] / 255).tolist()
    ways = [
        (NPY, npy(np.stack([image] * count))),
        (OCTETS, image.tobytes() * count),
        (JSON, as_json([in_base64(file)] * count)),
        (JSON, as_json([numbers] * count)),
        (JSON, as_json([numbers] * (count - 1) + [[[0.5]]])),
        (JSON, as_json([[numbers] * (count - 1), [[[0.5]]]])),
        (JSON, as_json([in_base64(npy(np.stack([image] * (count - 1)))), in_base64(file)])),
        (X_FORM, part(file) * count + b"--x--\r\n"),
        (X_FORM, part(npy(np.stack([image] * count))) + b"--x--\r\n"),
    ]
    for kind, body in ways:
        if count == 3:
            assert len(read((1, 8, 8), kind, body, small_limits())) == 3
        else:
            with pytest.raises(LimitExceeded, match="at most 3"):
                read((1, 8, 8), kind, body, small_limits())


def test_pixels_of_all_files_together_are_limited_before_any_is_decoded():
    """Three honest-looking files whose pixels do not exist: the sum of their headers is what is refused."""
    claim = hostile.png(hostile.header(1000, 1000), hostile.chunk(b"IDAT", b""), hostile.END)
    with pytest.raises(PayloadTooLarge, match="3000000 pixels: at most 2000000"):
        read((1, 8, 8), X_FORM, part(claim) * 3 + b"--x--\r\n", small_limits(max_pixels=2_000_000))
    with pytest.raises(InvalidInput, match="image 0: the PNG image is damaged"):
        read((1, 8, 8), X_FORM, part(claim) * 2 + b"--x--\r\n", small_limits(max_pixels=2_000_000))


def test_numbers_after_resizing_are_limited():
    """A kilobyte of 1×1 images must not become gigabytes of float32."""
    tiny = saved(pil((3, 1, 1)), "PNG")
    reader = Reader(rule((3, 2048, 2048)), Limits(1024, ImageLimits(2**20, 2**20), 2**27, 2**26))
    form = part(tiny) * 10 + b"--x--\r\n"
    with pytest.raises(PayloadTooLarge, match=r"10 images of shape .*: at most 5 here"):
        reader.read(X_FORM, form, lambda: None)
    with pytest.raises(PayloadTooLarge, match="at most 5 here"):
        reader.read(NPY, npy(np.zeros((6, 3, 1, 1), np.uint8)), lambda: None)


# Hostile bodies


def reader_of(shape: hostile.Shape, latent_dim: int) -> Callable[[hostile.Payload], np.ndarray]:
    """What the route of the payload's verb reads, the pair of interpolate aside."""
    reader = Reader(rule(shape), LIMITS)

    def answer(payload: hostile.Payload) -> np.ndarray:
        def document() -> Any:
            return parse_json(payload.body)

        if payload.verb == "decode":
            return read_latents(payload.content_type, payload.body, document, latent_dim, 1024)
        return reader.read(payload.content_type, payload.body, document)

    return answer


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 12)])
def test_every_hostile_body_is_refused_in_little_memory(shape):
    answer = reader_of(shape, latent_dim=5)
    hostile_bodies = [p for p in hostile.payloads(shape, 5) if not p.name.startswith("pair")]
    assert len({(p.content_type, p.body) for p in hostile_bodies}) >= 350
    tracemalloc.start()
    for payload in hostile_bodies:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises(InvalidInput) as refusal:
            pytest.fail(f"{payload.name}: accepted as {answer(payload).shape}")
        assert tracemalloc.get_traced_memory()[1] - before < 2**23 + 12 * len(payload.body), payload.name
        assert 10 < len(str(refusal.value)) < 500, payload.name
        assert "/work" not in str(refusal.value), payload.name
    tracemalloc.stop()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 12)])
def test_every_odd_but_good_body_is_read(shape):
    answer = reader_of(shape, latent_dim=5)
    for payload in hostile.odd_but_good(shape):
        x = answer(payload)
        assert x.dtype == np.float32, payload.name
        assert x.shape[1:] == shape, payload.name
        assert 1 <= len(x) <= 3, payload.name
        assert 0 <= x.min() <= x.max() <= 1, payload.name


KINDS = [*INPUTS, X_FORM, f"{FORM}; boundary=\x00", "text/plain"]
SEEDS = [payload for payload in hostile.odd_but_good((1, 8, 8)) if len(payload.body) < 20_000]


@st.composite
def damaged(draw: st.DrawFn) -> hostile.Payload:
    """An odd but good body with some bytes exchanged, cut or doubled."""
    payload = draw(st.sampled_from(SEEDS))
    data = bytearray(payload.body)
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(data)))
        stop = start + draw(st.integers(0, 8))
        data[start:stop] = draw(st.binary(max_size=8) | st.just(bytes(data[start : start + 40]) * 2))
    return payload._replace(body=bytes(data))


@settings(max_examples=400, deadline=None)
@given(damaged())
def test_damaged_bodies_give_pixels_or_our_error(payload):
    try:
        x = reader_of((1, 8, 8), 5)(payload)
    except InvalidInput:
        return
    assert x.dtype == np.float32
    assert x.shape[1:] == (1, 8, 8)
    assert 0 <= x.min() <= x.max() <= 1


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS) | st.text(max_size=40) | st.text(max_size=40).map((FORM + ";").__add__), st.binary())
def test_any_bytes_under_any_type_give_pixels_or_our_error(kind, body):
    for verb in ("encode", "decode"):
        try:
            x = reader_of((1, 1, 1), 1)(hostile.Payload("", verb, kind, body))
        except InvalidInput:
            continue
        assert x.dtype == np.float32


PIXEL = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
VALUE = st.recursive(PIXEL, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner))


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries({}, optional={"images": VALUE, "latents": VALUE, "dtype": st.just("uint8") | VALUE}) | VALUE
)
def test_any_json_gives_pixels_or_our_error(value):
    """As Python's parser gives it: with NaN, infinities and integers of any length."""
    for act in (
        lambda: Reader(rule((1, 2, 2)), LIMITS).read(JSON, b"{", lambda: value),
        lambda: read_latents(JSON, b"{", lambda: value, 2, 100),
    ):
        try:
            assert np.isfinite(act()).all()
        except InvalidInput:
            continue


@pytest.mark.parametrize("wrong", [True, False, None, "1", [1]])
@pytest.mark.parametrize("column", [0, 1, 2])
@pytest.mark.parametrize("number", [1, 0.5])
def test_one_value_among_numbers_that_is_none(wrong, column, number):
    row = [number] * 3
    row[column] = wrong
    with pytest.raises(InvalidInput, match=r"image 0: (numbers|the lists)"):
        read((1, 2, 3), JSON, as_json([[[number] * 3, row]]))
    body = json.dumps({"latents": [row]}).encode()
    with pytest.raises(InvalidInput, match=r"latents: (numbers|the lists)"):
        read_latents(JSON, body, lambda: parse_json(body), 3, 9)

"""The rule from image bytes to pixels, against numpy done by hand; damage of every kind is refused."""

from __future__ import annotations

import io
import struct
import sys
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from service.bundle.input_rules import Preprocessing
from service.errors import InvalidInput, PayloadTooLarge
from service.formats.images import ImageLimits, apply, decode_image, resize_array

LIMITS = ImageLimits(max_bytes=2**22, max_pixels=2**22)
RNG = np.random.RandomState(7)
COLOUR = RNG.randint(0, 256, (9, 14, 3), dtype=np.uint8)
GREY = RNG.randint(0, 256, (9, 14), dtype=np.uint8)


def rule(mode="L", height=9, width=14, **options) -> Preprocessing:
    return Preprocessing(mode=mode, height=height, width=width, **options)


def saved(image: Image.Image | np.ndarray, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def planes(pixels: np.ndarray) -> np.ndarray:
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def png_of(*chunks: tuple[bytes, bytes]) -> bytes:
    framed = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return png_of((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))


# Target size: nothing is touched


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
@pytest.mark.parametrize("fit", ["cover", "contain", "stretch"])
def test_an_image_of_the_target_size_is_untouched(form, options, fit):
    colour = decode_image(saved(COLOUR, form, **options), rule("RGB", fit=fit), LIMITS)
    np.testing.assert_array_equal(colour, planes(COLOUR))
    assert colour.dtype == np.uint8
    assert colour.flags.c_contiguous
    grey = decode_image(saved(GREY, form, **options), rule("L", fit=fit), LIMITS)
    np.testing.assert_array_equal(grey, planes(GREY))


def test_jpeg_is_what_pillow_decodes():
    data = saved(COLOUR, "JPEG", quality=90)
    np.testing.assert_array_equal(
        decode_image(data, rule("RGB"), LIMITS), planes(np.asarray(Image.open(io.BytesIO(data))))
    )


# Modes


def test_grey_goes_through_colour_and_back_exactly():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colour = decode_image(saved(ramp), rule("RGB", 16, 16), LIMITS)
    np.testing.assert_array_equal(colour, np.stack([ramp] * 3))
    back = decode_image(saved(np.stack([ramp] * 3, -1)), rule("L", 16, 16), LIMITS)
    np.testing.assert_array_equal(back, ramp[None])


def test_colour_becomes_grey_by_itu_r_601():
    grey = decode_image(saved(COLOUR), rule("L"), LIMITS)[0]
    np.testing.assert_allclose(grey, COLOUR @ np.array([0.299, 0.587, 0.114]), atol=0.51)


def test_every_16_bit_level_is_scaled_not_clipped():
    levels = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    grey = decode_image(saved(levels), rule("L", 256, 256), LIMITS)[0]
    np.testing.assert_array_equal(grey, np.rint(levels / 257))
    eight = np.arange(256, dtype=np.uint16)[:, None] * 257
    np.testing.assert_array_equal(decode_image(saved(eight), rule("L", 256, 1), LIMITS)[0], eight // 257)


def test_one_bit_is_black_and_white():
    bits = GREY > 127
    np.testing.assert_array_equal(decode_image(saved(Image.fromarray(bits)), rule("L"), LIMITS)[0], bits * 255)


def test_a_palette_is_looked_up():
    picture = Image.fromarray(GREY % 5, "P")
    colours = RNG.randint(0, 256, (5, 3), dtype=np.uint8)
    picture.putpalette(colours.tobytes())
    np.testing.assert_array_equal(decode_image(saved(picture), rule("RGB"), LIMITS), planes(colours[GREY % 5]))


def test_cmyk_is_ink_on_white():
    flat = np.broadcast_to(np.uint8([0, 255, 255, 0]), (16, 16, 4))
    red = decode_image(
        saved(Image.fromarray(np.ascontiguousarray(flat), "CMYK"), "JPEG", quality=95), rule("RGB", 16, 16), LIMITS
    )
    np.testing.assert_allclose(red.reshape(3, -1).mean(1), [255, 0, 0], atol=4)


@pytest.mark.parametrize("background", [0, 200, 255])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_alpha_is_composited_on_the_background(background, mode):
    alpha = RNG.randint(0, 256, (9, 14), dtype=np.uint8)
    alpha[0], alpha[1] = 0, 255
    base = GREY[..., None] if mode == "L" else COLOUR
    share = alpha[..., None] / 255
    expected = planes(share * base + (1 - share) * background)
    got = decode_image(saved(np.concatenate([base, alpha[..., None]], -1)), rule(mode, background=background), LIMITS)
    np.testing.assert_allclose(got, expected, atol=1)
    assert (got[:, 0] == background).all(), "transparent is the background"
    np.testing.assert_array_equal(got[:, 1], planes(base)[:, 1], "opaque is untouched")


def test_transparent_entries_of_palettes_and_of_16_bit_grey_become_the_background():
    picture = Image.fromarray(GREY % 4, "P")
    picture.putpalette(bytes([10, 10, 10, 20, 20, 20, 30, 30, 30, 40, 40, 40]))
    got = decode_image(saved(picture, transparency=2), rule("L", background=99), LIMITS)[0]
    np.testing.assert_array_equal(got, np.uint8([10, 20, 99, 40])[GREY % 4])
    levels = (GREY % 4).astype(np.uint16) * 257
    got = decode_image(saved(levels, transparency=2 * 257), rule("L", background=99), LIMITS)[0]
    np.testing.assert_array_equal(got, np.uint8([0, 1, 99, 3])[GREY % 4])


# EXIF orientation, as the standard draws it: stored pixels -> how they are meant to be seen

UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, -1)[:, ::-1][::-1, ::-1],
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_an_orientation_that_the_standard_does_not_know_turns_nothing(orientation, form):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(COLOUR, form, exif=exif, **options)
    np.testing.assert_array_equal(decode_image(data, rule("RGB"), LIMITS), planes(COLOUR))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {})])
def test_exif_orientation_is_applied_before_the_size_is_judged(orientation, form, options):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = saved(COLOUR, form, exif=exif, **options)
    stored = np.asarray(Image.open(io.BytesIO(data)))
    expected = planes(UPRIGHT[orientation](stored))
    got = decode_image(data, rule("RGB", *expected.shape[1:]), LIMITS, strict=True)
    np.testing.assert_array_equal(got, expected)


def test_exif_of_nonsense_neither_warns_nor_fails():
    broken = [
        b"Exif\0\0" + body
        for body in (b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + b"\x99" * 40, b"x" * 60)
    ]
    plain = saved(GREY, "JPEG")
    expected = decode_image(plain, rule(), LIMITS)
    for body in broken:
        data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]
        np.testing.assert_array_equal(decode_image(data, rule(), LIMITS), expected)


# Geometry


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos", "box"])
@pytest.mark.parametrize("fit", ["cover", "contain", "stretch"])
def test_shrinking_averages_and_does_not_alias(resample, fit):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = decode_image(saved(board), rule("L", 8, 8, fit=fit, resample=resample), LIMITS)[0]
    np.testing.assert_allclose(small, 127.5, atol=12)
    assert abs(small.mean() - 127.5) < 2


@pytest.mark.parametrize("tall", [False, True])
def test_cover_crops_the_centre(tall):
    bands = np.repeat(np.uint8([10, 20, 30, 40]), 8)[None].repeat(16, 0)  # 16 × 32: bands 8 wide
    expected = np.repeat(np.uint8([20, 30]), 4)[None].repeat(8, 0)
    turn = (lambda x: x.T) if tall else (lambda x: x)
    got = decode_image(saved(np.ascontiguousarray(turn(bands))), rule("L", 8, 8, resample="box"), LIMITS)[0]
    np.testing.assert_array_equal(got, turn(expected))


@pytest.mark.parametrize("tall", [False, True])
def test_contain_pads_with_the_background(tall):
    turn = (lambda x: x.T) if tall else (lambda x: x)
    flat = np.full((16, 32), 50, np.uint8)
    expected = np.full((8, 8), 7, np.uint8)
    expected[2:6] = 50
    got = decode_image(saved(np.ascontiguousarray(turn(flat))), rule("L", 8, 8, fit="contain", background=7), LIMITS)[0]
    np.testing.assert_array_equal(got, turn(expected))


def test_stretch_ignores_the_aspect_ratio():
    bands = np.repeat(np.uint8([10, 20, 30, 40]), 8)[None].repeat(16, 0)
    got = decode_image(saved(bands), rule("L", 4, 4, fit="stretch", resample="box"), LIMITS)[0]
    np.testing.assert_array_equal(got, np.uint8([[10, 20, 30, 40]] * 4))


@pytest.mark.parametrize("fit", ["cover", "contain", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 500), (200, 200)])
def test_a_flat_image_stays_flat_at_any_size(fit, size):
    got = decode_image(saved(np.full(size, 77, np.uint8)), rule("L", 6, 10, fit=fit, background=77), LIMITS)
    np.testing.assert_array_equal(got, np.full((1, 6, 10), 77))


def test_absurd_shapes_are_refused():
    with pytest.raises(InvalidInput, match="20000×1"):
        decode_image(saved(np.zeros((1, 20_000), np.uint8)), rule("L", 8, 8), LIMITS)


def test_strict_refuses_another_size_and_says_which_was_expected():
    with pytest.raises(InvalidInput, match=r"14×9.*28×20 expected"):
        decode_image(saved(GREY), rule("L", 20, 28), LIMITS, strict=True)
    decode_image(saved(GREY), rule("L", 9, 14), LIMITS, strict=True)


# Arrays follow the same rule


@pytest.mark.parametrize("fit", ["cover", "contain", "stretch"])
@pytest.mark.parametrize(("mode", "pixels"), [("L", GREY), ("RGB", COLOUR)])
def test_arrays_are_resized_as_images_are(fit, mode, pixels):
    preprocessing = rule(mode, 7, 6, fit=fit, background=40)
    expected = decode_image(saved(pixels), preprocessing, LIMITS)
    levels = np.ascontiguousarray(planes(pixels))[None]
    np.testing.assert_array_equal(resize_array(levels, preprocessing)[0], expected)
    floats = resize_array(levels / np.float32(255), preprocessing)
    np.testing.assert_array_equal(floats[0], expected / np.float32(255))
    assert floats.dtype == np.float32


def test_floats_between_the_levels_keep_their_precision():
    fine = np.linspace(0, 1, 300, dtype=np.float32)[:256].reshape(1, 1, 16, 16)
    small = resize_array(fine, rule("L", 4, 4, resample="box"))
    np.testing.assert_allclose(small[0, 0], fine.reshape(4, 4, 4, 4).mean((1, 3)), atol=1e-6)


def test_arrays_of_the_target_size_are_returned_as_they_are():
    x = np.ascontiguousarray(planes(GREY))[None]
    assert resize_array(x, rule()) is x
    with pytest.raises(InvalidInput, match=r"14×9: 5×4 expected"):
        resize_array(x, rule("L", 4, 5), strict=True)
    with pytest.raises(InvalidInput, match=r"\(N, 3, 9, 14\) expected"):
        resize_array(x, rule("RGB"))


def test_apply_takes_pillow_images():
    np.testing.assert_array_equal(apply(Image.fromarray(GREY), rule()), GREY[None])


# What is read, and what is not


def test_only_png_jpeg_and_webp_are_read():
    for form in ("GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX"):
        with pytest.raises(InvalidInput, match="PNG, JPEG or WebP"):
            decode_image(saved(GREY, form), rule(), LIMITS)
    for text in (b"", b"GIF89a", b"hello, I am a picture", b"<svg/>", b"%PDF-1.7", b"\0" * 100):
        with pytest.raises(InvalidInput):
            decode_image(text, rule(), LIMITS)


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_the_first_frame_of_an_animation_counts(form, options):
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    data = saved(frames[0], form, save_all=True, append_images=frames[1:], duration=50, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    np.testing.assert_array_equal(decode_image(data, rule("RGB"), LIMITS), planes(COLOUR))


def test_a_multi_picture_jpeg_is_its_first_picture():
    data = saved(Image.fromarray(GREY), "MPO", save_all=True, append_images=[Image.fromarray(255 - GREY)])
    np.testing.assert_array_equal(decode_image(data, rule(), LIMITS), decode_image(saved(GREY, "JPEG"), rule(), LIMITS))


# Damage and bombs


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "colour"])
def test_every_truncation_is_refused(form, pixels):
    data = saved(pixels, form)
    for end in range(len(data)):
        with pytest.raises(InvalidInput):
            decode_image(data[:end], rule(), LIMITS)


def test_every_flipped_bit_of_a_png_is_refused():
    data = saved(GREY[:4, :4])
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InvalidInput):
            decode_image(bytes(flipped), rule(), LIMITS)


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_flipped_bytes_decode_or_are_refused_in_words(form):
    data, refusals = saved(COLOUR, form), set()
    for position in range(len(data)):
        for value in (0, 255, data[position] ^ 16):
            damaged = data[:position] + bytes([value]) + data[position + 1 :]
            try:
                shape = decode_image(damaged, rule("RGB"), LIMITS).shape
            except InvalidInput as error:
                refusals.add(str(error))
            else:
                assert shape == (3, 9, 14)
    assert refusals
    assert all(10 < len(text) < 300 for text in refusals)


@pytest.mark.parametrize(
    "size", [(2**11 + 1, 2**11), (60_000, 60_000), (10_000, 10_000), (2**31 - 1, 2**31 - 1), (2**22 + 1, 1)]
)
def test_pixels_are_limited_by_the_header_alone(size):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(PayloadTooLarge, match="at most 4194304"):
            decode_image(claims(*size), rule(), LIMITS)
    assert not caught


def test_limits_are_inclusive():
    data = saved(GREY)
    decode_image(data, rule(), ImageLimits(len(data), GREY.size))
    with pytest.raises(PayloadTooLarge, match=f"{len(data)} bytes: at most {len(data) - 1}"):
        decode_image(data, rule(), ImageLimits(len(data) - 1, GREY.size))
    with pytest.raises(PayloadTooLarge, match="14×9"):
        decode_image(data, rule(), ImageLimits(len(data), GREY.size - 1))


def test_a_header_that_promises_more_than_the_data_is_damage():
    with pytest.raises(InvalidInput, match="damaged or truncated"):
        decode_image(claims(100, 100), rule(), LIMITS)


def test_threads_decode_alike_and_leave_the_filters_of_warnings_alone():
    data, preprocessing, decoded = saved(COLOUR), rule("RGB", 5, 5), []
    expected = decode_image(data, preprocessing, LIMITS)
    before = list(warnings.filters)

    def work() -> None:
        decoded.extend(decode_image(data, preprocessing, LIMITS) for _ in range(500))

    threads = [threading.Thread(target=work) for _ in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places as often as they can
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(decoded) == 4000
    assert all((image == expected).all() for image in decoded)
    assert list(warnings.filters) == before

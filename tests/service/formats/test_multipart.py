"""Forms as browsers and clients send them; floods of boundaries cost nothing; nothing touches the disk."""

from __future__ import annotations

import contextlib
import tempfile
import time

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import InvalidInput, LimitExceeded
from service.formats.multipart import read_multipart
from tests.hostile import FORM, X_FORM, part

END = b"--x--\r\n"


def files(body: bytes, max_files: int = 1024) -> list[bytes]:
    return read_multipart(X_FORM, body, max_files)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(), min_size=1, max_size=5))
def test_what_a_client_sends_is_what_is_read(contents):
    request = httpx.Request("POST", "http://test", files=[("images", (f"{i}.png", c)) for i, c in enumerate(contents)])
    assert read_multipart(request.headers["content-type"], request.read(), 5) == contents


def test_contents_that_look_like_a_form():
    contents = [
        b"\r\n--y\r\n",
        b"--x",
        b"\r\n--",
        b"\r\n-",
        b"\r",
        b"\r\n\r\n",
        b"",
        b"--x--\r\n",
        bytes(range(256)) * 9,
    ]
    assert files(b"".join(map(part, contents)) + END) == contents


def test_transfer_encodings():
    for name, body in {"binary": b"a=b", "8bit": b"a=b", "BASE64": b"YT1i", "quoted-printable": b"a=3Db"}.items():
        assert files(part(body, extra=f"content-transfer-encoding: {name}\r\n".encode()) + END) == [b"a=b"]


@pytest.mark.parametrize(
    "disposition",
    [
        "form-data; name=images; filename=a.png",
        'form-data; filename="a.png"; name="images"',
        'FORM-DATA; name="images"; filename="../../etc/passwd"',
        "form-data; name=\"images\"; filename*=UTF-8''%e2%82%ac.png",
        'form-data; name="images"; filename="a\0\\".png"',
        'form-data; name="images"',
    ],
)
def test_dispositions(disposition):
    assert files(part(b"abc", disposition) + END) == [b"abc"]


@pytest.mark.parametrize(
    "name", ["image", "images", "file", "files", "images[]", "image[]", "files[]", "file[]", "images[0]", "file[12]"]
)
def test_field_names(name):
    """Of curl -F file=@…, FastAPI's files, PHP's lists and axios' numbered ones."""
    assert files(part(b"abc", f'form-data; name="{name}"; filename="a.png"') * 2 + END) == [b"abc"] * 2


@pytest.mark.parametrize("name", ["imagess", "IMAGES", "files[a]", "images[-1]", "x", "", "images\n", "seed"])
def test_other_field_names(name):
    with pytest.raises(InvalidInput, match=r"form field .*: only files in 'images' expected"):
        files(part(b"abc") + part(b"1", f'form-data; name="{name}"') + END)


def test_files_are_counted_before_they_are_read():
    for count in (2, 3, 4, 5000):
        body = part(b"a") * count + END
        if count <= 3:
            assert len(files(body, 3)) == count
        else:
            with pytest.raises(LimitExceeded, match="over 3 files"):
                files(body, 3)


FLOODS = {
    "boundary": b"\r\n--x",
    "boundary and a letter": b"\r\n--xy",
    "boundary and a blank": b"\r\n--x ",
    "boundary and CR": b"\r\n--x\r",
    "boundary and hyphen": b"\r\n--x-",
    "boundary line": b"\r\n--x\r\n",
    "closing line": b"\r\n--x--",
    "beginning": b"\r\n--",
    "CRLF": b"\r\n",
    "CR": b"\r",
    "LF": b"\n",
    "hyphen": b"-",
    "blank": b" ",
    "header": b"a:b\r\n",
    "colon": b":",
    "equals sign": b"=",
    "part": b"\r\n--x\r\n\r\n",
    "semicolon": b"; a=",
}
HEADS = {
    "the body": b"",
    "the preamble": b"\r\n",
    "after the boundary": b"--x",
    "after a second boundary": part(b"a") + b"--x",
    "the headers": b"--x\r\n",
    "a header": b"--x\r\nContent-Disposition: form-data",
    "the data": part(b"", extra=b"")[:-2],
    "quoted-printable": part(b"", extra=b"content-transfer-encoding: quoted-printable\r\n")[:-2],
    "base64": part(b"", extra=b"content-transfer-encoding: base64\r\n")[:-2],
    "the epilogue": part(b"a") + END,
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("flood", FLOODS)
def test_8_megabytes_of_anything_anywhere_take_well_under_a_second(flood, head):
    """Or of many parts: the parser alone takes 8 s for some of these."""
    body = HEADS[head] + FLOODS[flood] * (2**23 // len(FLOODS[flood])) + b"\r\n" + END
    start = time.process_time()
    with contextlib.suppress(InvalidInput):
        files(body)
    assert time.process_time() - start < 0.7


@pytest.mark.parametrize(
    "parameter", ["; a=b", ";", '; boundary="x', "; boundary*0=x", '"', "\\", "; boundary=x", "=", "''"]
)
def test_a_long_content_type_takes_no_time(parameter):
    start = time.process_time()
    with contextlib.suppress(InvalidInput):
        read_multipart(FORM + parameter * (32_000 // len(parameter)), part(b"a") + END, 10)
    assert time.process_time() - start < 0.3


def test_large_files_stay_in_memory(monkeypatch):
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", lambda *_, **__: pytest.fail("a temporary file"))
    content = bytes(3 * 2**20)
    assert files(part(content) + END) == [content]


@pytest.mark.parametrize("kind", ["é", "Ā", "\0", "; boundary=\udcff", "; boundary=Ā"])
def test_content_types_outside_ascii(kind):
    with pytest.raises(InvalidInput):
        read_multipart(FORM + kind, part(b"a") + END, 10)

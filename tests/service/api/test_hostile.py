"""Hostile requests over real HTTP: each a 4xx in the one shape within a second, the next good one bitwise as before."""

from __future__ import annotations

import io
import json
import struct
import zlib
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from tests.hostile import odd_but_good, payloads
from tests.ppca_bundle import LATENT_DIM, SHAPE, images
from tests.service.http import PROBLEM_KEYS, assert_problem, npy, send_raw, serving

NPY, JSON = "application/x-npy", "application/json"
X = images(2, seed=31)


class Case(NamedTuple):
    """One request that must be refused; ``status`` where only one will do."""

    name: str
    path: str
    content: Any = None
    content_type: str = ""
    method: str = "POST"
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed
    status: int | None = None


@pytest.fixture(scope="module")
def client(ppca_root):
    with serving(ppca_root, max_body_bytes=2**20, receive_timeout=0.5, header_timeout=0.5) as client:
        yield client


def ask_well(client) -> bytes:
    """The answer to a good request."""
    response = client.post("/v1/score", content=npy(X[:1]), headers={"content-type": NPY})
    assert response.status_code == 200
    return response.content


@pytest.fixture(scope="module")
def before(client):
    return ask_well(client)


def npy_with_header(header: str, payload: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    data = header.encode("latin1") + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(data)) + data + payload


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header claims a size that its data does not have."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def picture(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.round(images(1, (1, 32, 32))[0, 0] * 255).astype(np.uint8)).save(buffer, form)
    return buffer.getvalue()


def image_bodies() -> list[tuple[str, Any, str]]:
    """(name, body, Content-Type) that no verb can read as images."""
    return [*_typed(), *_arrays(), *_documents(), *_pictures(), *_octets(), *_forms()]


def _typed() -> list[tuple[str, Any, str]]:
    """Types that are not read, and bodies that are empty."""
    return [
        *[
            (f"content type {t!r}", b"x", t)
            for t in ("text/plain", "text/html", "garbage", "image/tiff", "image/svg+xml")
        ],
        *[(f"content type {t!r}", b"x", t) for t in ("application/x-npz", "application/pickle", "*/*", "/", ";;;")],
        ("no content type", npy(X), ""),
        *[
            (f"empty {t}", b"", t)
            for t in (NPY, JSON, "image/png", "image/jpeg", "image/webp", "application/octet-stream")
        ],
    ]


def _arrays() -> list[tuple[str, Any, str]]:
    shape = "'shape': {}, }}"
    head = "{{'descr': '{}', 'fortran_order': False, " + shape
    pixel = np.full((1, 1, 8, 8), 0.5, np.float32)
    nan, big, negative, infinite = (pixel.copy() for _ in range(4))
    nan[0, 0, 3, 3], big[0, 0, 0, 0], negative[0, 0, 0, 0], infinite[0, 0, 7, 7] = np.nan, 1.5, -0.1, np.inf
    return [
        ("npy of noise", bytes(range(256)), NPY),
        ("npy magic only", b"\x93NUMPY", NPY),
        ("npy version 9", npy_with_header(head.format("<f4", "(1, 1, 8, 8)"), b"\0" * 256, b"\x09\x00"), NPY),
        ("npy claims 10^12 floats", npy_with_header(head.format("<f4", "(1000000, 1000000)")), NPY),
        ("npy overflowing shape", npy_with_header(head.format("<f4", f"({2**63}, 1, 8, 8)"), b"\0" * 256), NPY),
        ("npy negative shape", npy_with_header(head.format("<f4", "(-5, 1, 8, 8)"), b"\0" * 256), NPY),
        ("npy object dtype", npy(np.array([{"a": 1}], dtype=object)), NPY),
        ("npy string dtype", npy(np.array(["a", "b"])), NPY),
        ("npy complex", npy(pixel.astype(np.complex64)), NPY),
        ("npy structured", npy(np.zeros(3, [("a", "f4")])), NPY),
        ("npy datetime", npy(np.zeros((1, 1, 8, 8), "M8[s]")), NPY),
        ("npy header is code", npy_with_header("__import__('os').system('true')"), NPY),
        ("npy header deep", npy_with_header("(" * 5000), NPY),
        ("npy truncated", npy(X)[:-7], NPY),
        ("npy scalar", npy(np.float32(0.5)), NPY),
        ("npy no images", npy(np.zeros((0, 1, 8, 8), np.float32)), NPY),
        ("npy many dimensions", npy(np.zeros((1,) * 20, np.float32)), NPY),
        ("npy three channels", npy(np.zeros((1, 3, 8, 8), np.float32)), NPY),
        ("npy NaN", npy(nan), NPY),
        ("npy above 1", npy(big), NPY),
        ("npy below 0", npy(negative), NPY),
        ("npy infinite", npy(infinite), NPY),
        ("npz for npy", _npz(), NPY),
    ]


def _documents() -> list[tuple[str, Any, str]]:
    return [
        ("json cut", b'{"images": [[', JSON),
        ("json text", b"hello", JSON),
        ("json NaN", b'{"images": [[NaN]]}', JSON),
        ("json Infinity", b'{"images": [[Infinity]]}', JSON),
        ("json NaN elsewhere", b'{"a": NaN}', JSON),
        ("json null", b"null", JSON),
        ("json number", b"7", JSON),
        ("json string", b'"images"', JSON),
        ("json true", b"true", JSON),
        ("json empty object", b"{}", JSON),
        ("json images null", b'{"images": null}', JSON),
        ("json images empty", b'{"images": []}', JSON),
        ("json images object", b'{"images": {"a": 1}}', JSON),
        ("json images numbers", b'{"images": [1, 2, 3]}', JSON),
        ("json ragged", b'{"images": [[[0, 0], [0]]]}', JSON),
        ("json mixed", b'{"images": [[["a", 0], [0, null]]]}', JSON),
        ("json bad base64", b'{"images": ["%%%not base64%%%"]}', JSON),
        ("json base64 of text", b'{"images": ["aGVsbG8="]}', JSON),
        ("json a path", b'{"images": ["/etc/passwd"]}', JSON),
        ("json a url", b'{"images": ["http://127.0.0.1/"]}', JSON),
        ("json out of range", json.dumps({"images": (X * 9).tolist()}).encode(), JSON),
        ("json huge number", b'{"images": [[[1e400]]]}', JSON),
        ("json huge integer", b'{"images": [[[' + b"9" * 5000 + b"]]]}", JSON),
        ("json deep", b"[" * 250_000 + b"]" * 250_000, JSON),
        ("json deep inside", b'{"images":' + b"[" * 250_000 + b"]" * 250_000 + b"}", JSON),
        ("json unknown field", json.dumps({"images": X.tolist(), "sedd": 1}).encode(), JSON),
        ("json not utf-8", b'{"images": "\xff\xfe"}', JSON),
        ("json lone surrogate", b'{"images": ["\\ud800"]}', JSON),
        ("json strict and of another size", b'{"images": [[[0, 0], [0, 0]]], "strict": true}', JSON),
    ]


def _pictures() -> list[tuple[str, Any, str]]:
    return [
        ("png of 60000 x 60000", png_of(60_000, 60_000), "image/png"),
        ("png of 2^31 - 1", png_of(2**31 - 1, 2**31 - 1), "image/png"),
        ("png of 0 x 0", png_of(0, 0), "image/png"),
        ("png zlib bomb", png_of(30_000, 30_000, b"\0" * 30_000_000), "image/png"),
        ("png truncated", picture("PNG")[:-30], "image/png"),
        ("png head only", picture("PNG")[:20], "image/png"),
        ("png that is text", b"I am a picture" * 10, "image/png"),
        ("jpeg truncated", picture("JPEG")[:200], "image/jpeg"),
        ("jpeg that is text", b"\xff\xd8\xff" + b"a" * 100, "image/jpeg"),
        ("webp truncated", picture("WEBP")[:40], "image/webp"),
        ("webp that is riff", b"RIFF\xff\xff\xff\xffWEBPVP8 ", "image/webp"),
        ("gif as png", picture("GIF"), "image/png"),
    ]


def _octets() -> list[tuple[str, Any, str]]:
    return [
        ("octets too few", b"\0" * 63, "application/octet-stream"),
        ("octets too many", b"\0" * 65, "application/octet-stream"),
        ("body too large", b"\0" * (2**20 + 1), NPY),
    ]


def _forms() -> list[tuple[str, Any, str]]:
    return [
        ("multipart without boundary", b"--x\r\n", "multipart/form-data"),
        (
            "multipart that never ends",
            b"--x\r\ncontent-disposition: form-data; name=images\r\n\r\n",
            "multipart/form-data; boundary=x",
        ),
        ("multipart huge boundary", b"--x", "multipart/form-data; boundary=" + "b" * 8000),
        ("multipart nothing", b"--x--\r\n", "multipart/form-data; boundary=x"),
        ("multipart empty part", _part(b""), "multipart/form-data; boundary=x"),
        ("multipart text field", _part(b"hello", filename=False), "multipart/form-data; boundary=x"),
        ("multipart bad image", _part(b"hello"), "multipart/form-data; boundary=x"),
        ("multipart other field", _part(picture("PNG"), field="picture"), "multipart/form-data; boundary=x"),
        (
            "multipart no name",
            b"--x\r\ncontent-disposition: form-data\r\n\r\na\r\n--x--\r\n",
            "multipart/form-data; boundary=x",
        ),
        ("multipart thousands of parts", _part(b"")[:-7] * 3000 + b"--x--\r\n", "multipart/form-data; boundary=x"),
        ("multipart long preamble", b"z" * 500_000 + b"\r\n" + _part(b""), "multipart/form-data; boundary=x"),
    ]


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=X)
    return buffer.getvalue()


def _part(body: bytes, field: str = "images", filename: bool = True) -> bytes:
    name = f'name="{field}"' + ('; filename="../../a.png"' if filename else "")
    return f"--x\r\ncontent-disposition: form-data; {name}\r\n\r\n".encode() + body + b"\r\n--x--\r\n"


def latent_bodies() -> list[tuple[str, Any, str]]:
    """(name, body, Content-Type) that are no latents."""
    z = np.zeros((2, LATENT_DIM), np.float32)
    return [
        ("latents too narrow", npy(z[:, :-1]), NPY),
        ("latents too wide", npy(np.zeros((2, LATENT_DIM + 1), np.float32)), NPY),
        ("latents none", npy(z[:0]), NPY),
        ("latents NaN", npy(np.full_like(z, np.nan)), NPY),
        ("latents infinite", npy(np.full_like(z, np.inf)), NPY),
        ("latents beyond float32", npy(np.full(z.shape, 1e300)), NPY),
        ("latents of text", npy(np.array(["a"] * LATENT_DIM)), NPY),
        ("latents of objects", npy(np.array([None] * LATENT_DIM)), NPY),
        ("latents 3-D", npy(z[None]), NPY),
        ("latents too many", npy(np.zeros((1025, LATENT_DIM), np.float32)), NPY),
        ("latents json ragged", b'{"latents": [[0, 0], [0]]}', JSON),
        ("latents json null", b'{"latents": null}', JSON),
        ("latents json strings", b'{"latents": [["a", "b", "c", "d", "e"]]}', JSON),
        ("latents json NaN", b'{"latents": [[NaN, 0, 0, 0, 0]]}', JSON),
        ("latents json missing", b'{"seed": 1}', JSON),
        ("latents as png", picture("PNG"), "image/png"),
        ("latents empty", b"", NPY),
        ("latents deep", b'{"latents":' + b"[" * 250_000, JSON),
    ]


QUERIES = {
    "sample": [
        *["n=0", "n=-1", "n=257", "n=1e9", "n=99999999999999999999", "n=many", "n=", "n=1&n=2000", "n=NaN", "n=1.5"],
        *["temperature=nan", "temperature=inf", "temperature=-1", "temperature=1e9", "seed=-1", "seed=4294967296"],
        *[
            "seed=1.5",
            "seed=a",
            "seed=%00",
            "draw=perhaps",
            "sed=1",
            "n[]=1",
            "__class__=1",
            "a" * 2000 + "=1",
            "%ff=1",
        ],
    ],
    "score": [
        *["k=0", "k=-1", "k=5001", "k=1e3", "k=abc", "estimator=dreg", "estimator=", "score=nope", "score=../../etc"],
        *["false_positive_rate=0", "false_positive_rate=1", "false_positive_rate=nan", "false_positive_rate=-0.1"],
        *["false_positive_rate=1e-9", "seed=-5", "map=maybe", "strict=2", "K=1", "score=" + "s" * 500, "score=%0d%0a"],
    ],
    "interpolate": ["steps=1", "steps=0", "steps=257", "steps=x", "mode=cubic", "mode=", "seed=-1", "n=4"],
    "encode": ["samples=-1", "samples=257", "samples=x", "array=nothing", "seed=-1", "array=__dict__", "k=1"],
    "decode": ["seed=-1", "draw=x", "steps=3"],
}

ODD_NAMES = [
    *[
        "..",
        "../ppca",
        "../../etc/passwd",
        "%2e%2e",
        "ppca%00",
        "ppca/../ppca",
        "/etc/passwd",
        "PPCA",
        "ppca ",
        " ppca",
    ],
    *[
        "ppca\n",
        "ppca\u202e",
        "a" * 3000,
        "*",
        "?",
        "ppca;1",
        "ppca%0d%0ax-evil: 1",
        "\x1b[31m",
        "con",
        ".",
        "~",
        "ppca\\1",
    ],
]


def cases() -> list[Case]:
    """Every request that httpx can say."""
    return [*_with_bodies(), *_with_queries(), *_at_addresses(), *_with_headers(), *_said()]


def _with_bodies() -> list[Case]:
    found = [
        Case(f"{verb}: {name}", f"/v1/{verb}", body, content_type)
        for verb in ("encode", "score", "interpolate")
        for name, body, content_type in image_bodies()
    ]
    found += [
        Case(f"{verb}: {name}", f"/v1/{verb}", body, content_type)
        for verb in ("decode", "interpolate")
        for name, body, content_type in latent_bodies()
        if verb == "decode" or name != "latents as png"
    ]
    return found


def _with_queries() -> list[Case]:
    found: list[Case] = []
    good = {"sample": (None, ""), "decode": (npy(np.zeros(LATENT_DIM, np.float32)), NPY)}
    for verb, queries in QUERIES.items():
        body, content_type = good.get(verb, (npy(X), NPY))
        found += [Case(f"{verb}?{query[:40]}", f"/v1/{verb}?{query}", body, content_type) for query in queries]
    return found


def _at_addresses() -> list[Case]:
    found = [
        Case(f"model {name[:30]!r}", f"/v1/models/{quote(name, safe='')}/score", npy(X), NPY, status=404)
        for name in ODD_NAMES
        if name not in (".", "..")
    ]
    found += [
        Case(
            f"version {name[:30]!r}", f"/v1/models/ppca/versions/{quote(name, safe='')}/score", npy(X), NPY, status=404
        )
        for name in ("0", "01", "2", "-1", "1.0", "latest", "%00", "1 ", "a" * 3000, "../1")
    ]
    found += [
        Case(f"{method} {path}", path, method=method, status=405)
        for method, path in (
            ("DELETE", "/v1/models/ppca"),
            ("GET", "/v1/score"),
            ("PUT", "/livez"),
            ("PATCH", "/v1/sample"),
        )
    ]
    found += [
        Case(f"path {path}", path, method="GET", status=404)
        for path in (
            "/v1",
            "/v1/models/",
            "//livez",
            "/livez/",
            "/%2e%2e/etc/passwd",
            "/static/../app.py",
            "/%00",
            "/.git/config",
        )
    ]
    return found


def _with_headers() -> list[Case]:
    found = [
        Case(f"Accept {accept[:30]!r}", "/v1/sample", headers={"accept": accept}, status=406)
        for accept in (
            "text/html",
            "image/gif",
            "x",
            "application/json;q=0",
            "*/*;q=0",
            "application/json;q=x",
            "a/b," * 900,
        )
    ]
    found += [
        Case(
            f"Content-Encoding {name}",
            "/v1/score",
            zlib.compress(npy(X)),
            NPY,
            headers={"content-encoding": name},
            status=415,
        )
        for name in ("gzip", "deflate", "br", "zstd", "gzip, gzip")
    ]
    return found


def _said() -> list[Case]:
    """Parameters in the body."""
    said = [("sample", {"n": "3"}), ("sample", {"n": True}), ("sample", {"n": 10**30}), ("sample", {"seed": 1.5})]
    found = [Case(f"{verb} body {body}", f"/v1/{verb}", json.dumps(body).encode(), JSON) for verb, body in said]
    found.append(Case("said twice", "/v1/sample?n=3", b'{"n": 4}', JSON, status=422))
    return found


ALL = cases()


@pytest.mark.parametrize("case", ALL, ids=[case.name for case in ALL])
def test_hostile_request_is_refused(client, before, case):
    headers = {"content-type": case.content_type, **case.headers} if case.content_type else case.headers
    response = client.request(case.method, case.path, content=case.content, headers=headers)
    assert_problem(response, case.status)
    assert response.elapsed.total_seconds() < 1
    assert len(response.text) < 5000
    assert ask_well(client) == before


def test_there_are_enough():
    assert len(ALL) >= 200


START = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-npy\r\n"
RAW = {
    "no http": b"hello\r\n\r\n",
    "tls hello": bytes.fromhex("160301020001000ffc0303") + b"\0" * 100,
    "http 9.9": b"GET /livez HTTP/9.9\r\nhost: x\r\n\r\n",
    "length and chunked": START + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": START + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
    "negative length": START + b"content-length: -1\r\n\r\n",
    "length is text": START + b"content-length: many\r\n\r\n",
    "length overflows": START + b"content-length: 99999999999999999999999\r\n\r\n",
    "length too large": START + b"content-length: 99999999999\r\n\r\n",
    "bad chunk size": START + b"transfer-encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
    "chunk size overflows": START + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    "unknown transfer encoding": START + b"transfer-encoding: gzip, identity\r\n\r\n",
    "header without colon": b"GET /livez HTTP/1.1\r\nhost x\r\n\r\n",
    "nul in a header": b"GET /livez HTTP/1.1\r\nhost: x\r\nx-a: \0\r\n\r\n",
    "space before the colon": b"GET /livez HTTP/1.1\r\nhost : x\r\n\r\n",
    "10000 headers": b"GET /livez HTTP/1.1\r\n" + b"".join(b"x-%d: 1\r\n" % i for i in range(10_000)) + b"\r\n",
    "1 MB header": b"GET /livez HTTP/1.1\r\nx-a: " + b"a" * 2**20 + b"\r\n\r\n",
    "1 MB path": b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    "path beyond ascii": b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
    "half a header": b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-le",
    "half a body": START + b"content-length: 500\r\n\r\nhalf",
    "million chunks": START + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 150_000 + b"0\r\n\r\n",
}


@pytest.mark.parametrize("name", RAW)
def test_hostile_bytes_are_refused(client, before, name):
    data = RAW[name].replace(b"\r\nhost: x\r\n", b"\r\nhost: x\r\nconnection: close\r\n", 1)
    status, head, body = send_raw(client, data)
    assert 400 <= status < 500
    assert b"application/problem+json" in head.lower()
    problem = json.loads(body)
    assert problem.keys() >= PROBLEM_KEYS
    assert problem["status"] == status
    assert ask_well(client) == before


PAYLOADS = payloads(SHAPE, LATENT_DIM)
ODD = odd_but_good(SHAPE)


@pytest.mark.parametrize("payload", PAYLOADS, ids=[f"{payload.verb}: {payload.name}" for payload in PAYLOADS])
def test_hostile_body_is_refused(client, before, payload):
    headers = {"content-type": payload.content_type} if payload.content_type else {}
    response = client.post(f"/v1/models/ppca/{payload.verb}", content=payload.body, headers=headers)
    assert_problem(response)
    assert response.elapsed.total_seconds() < 1
    assert ask_well(client) == before


@pytest.mark.parametrize("payload", ODD, ids=[f"{payload.verb}: {payload.name}" for payload in ODD])
def test_odd_but_good_bodies_are_answered(client, payload):
    headers = {"content-type": payload.content_type}
    response = client.post(f"/v1/models/ppca/{payload.verb}", content=payload.body, headers=headers)
    assert response.status_code == 200, response.text

"""What a request says of the length of its body: the wrong is refused, and what counts is what arrives."""

from __future__ import annotations

import asyncio
import json

import pytest

from service.api.middleware import BodyBudget, BodyLimits
from service.errors import Overloaded, PayloadTooLarge
from tests.service.http import APPS, PROBLEM_KEYS, serving
from tests.service.requests import IDLE, OCTETS, ROW, post, received, statuses, under_way

MAX_BODY = 2**16


@pytest.fixture(scope="module")
def client(ppca_root):
    with serving(ppca_root, max_body_bytes=MAX_BODY, receive_timeout=5) as client:
        yield client


WRONG = {
    "24 digits": [b"100000000000000000000064"],
    "24 digits behind zeros": [b"0" * 9 + b"100000000000000000000064"],
    "64 bits and more": [b"18446744073709551680"],  # 2^64 + 64
    "a plus": [b"+64"],
    "a minus": [b"-64"],
    "minus one": [b"-1"],
    "an underscore": [b"6_4"],
    "hexadecimal": [b"0x40"],
    "an exponent": [b"6e1"],
    "a fraction": [b"64.0"],
    "two numbers": [b"64, 64"],
    "space inside": [b"6 4"],
    "nothing": [b""],
    "fullwidth digits": ["６４".encode()],
    "arabic digits": ["٦٤".encode()],
    "superscript": ["⁶⁴".encode()],
    "latin superscript": [b"\xb2\xb3"],
    "twice the same": [b"64", b"64"],
    "twice": [b"64", b"640"],
    "twice, the second wrong": [b"64", b"+64"],
}
ONE_REQUEST_MORE = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"


def with_lengths(lengths, *more):
    lines = [b"POST /v1/encode HTTP/1.1", b"host: x", b"content-type: " + OCTETS.encode()]
    lines += [*more, *(b"content-length: " + length for length in lengths)]
    return b"\r\n".join(lines) + b"\r\n\r\n"


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("remembered", [False, True])
def test_a_length_that_is_none_is_refused_and_nothing_behind_it_read(client, name, remembered):
    APPS[client].state.remembered.clear()
    if remembered:
        assert post(client, "encode", "", OCTETS, ROW, at="/v1").status_code == 200
    answered = received(client, with_lengths(WRONG[name]) + ROW + ONE_REQUEST_MORE)
    assert statuses(answered) == [b"400"]
    assert_problem_of(answered)
    assert under_way(client) == IDLE


@pytest.mark.parametrize("name", [*WRONG, "right"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_length_beside_a_transfer_encoding_is_refused(client, name, order):
    """Two readers of such a request could disagree on where it ends."""
    chunk = b"%x\r\n%b\r\n0\r\n\r\n" % (len(ROW), ROW)
    for more in (b"transfer-encoding: chunked", b"Transfer-Encoding: gzip, chunked"):
        lengths = WRONG.get(name, [b"64"])
        head = with_lengths(lengths, more)
        if order < 0:
            head = with_lengths([]).replace(b"host: x", b"host: x\r\ncontent-length: " + lengths[0] + b"\r\n" + more)
        answered = received(client, head + chunk + ONE_REQUEST_MORE)
        assert statuses(answered) == [b"400"]
        assert_problem_of(answered)
        assert under_way(client) == IDLE


TOO_LARGE = [b"%d" % (MAX_BODY + 1), b"9" * 18, b"9" * 19, b"18446744073709551615", b"0" * 20 + b"9" * 12]


@pytest.mark.parametrize("length", TOO_LARGE)
def test_a_length_beyond_the_limit_is_refused_before_the_body_has_come(client, length):
    answered = received(client, with_lengths([length], b"connection: close"))
    assert statuses(answered) == [b"413"]
    assert b"setting max_body_bytes" in answered
    assert_problem_of(answered)
    assert under_way(client) == IDLE


@pytest.mark.parametrize("length", [b"64", b"0064", b"0" * 30 + b"64", b"0" * 5000 + b"64"])
def test_zeros_before_a_length_change_nothing(client, length):
    answered = received(client, with_lengths([length], b"connection: close") + ROW)
    assert statuses(answered) == [b"200"]
    assert under_way(client) == IDLE


def assert_problem_of(answered):
    head, _, body = answered.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    assert json.loads(body).keys() >= PROBLEM_KEYS


def limited(lengths, pieces, budget):
    """What the middleware gives to the app of these pieces: (bytes, error), and what the budget holds meanwhile."""
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    scope = {"type": "http", "headers": [(b"content-length", length) for length in lengths]}
    read, held = bytearray(), []

    async def receive():
        return messages.pop(0)

    async def app(scope, receive, send):
        while (message := await receive())["more_body"]:
            read.extend(message["body"])
            held.append(budget.held)

    async def body():
        try:
            await BodyLimits(app, budget)(scope, receive, None)
        except (PayloadTooLarge, Overloaded) as error:
            return bytes(read), type(error), held
        return bytes(read), None, held

    return asyncio.run(body())


LENGTHS = {**WRONG, "none": [], "one that is less": [b"3"], "one that is more": [b"64"], "many zeros": [b"0" * 5000]}


@pytest.mark.parametrize("name", LENGTHS)
def test_whatever_a_server_lets_through_what_arrives_is_what_counts(name):
    """Servers differ in what they take for a length; the middleware must not count by it."""
    lengths = LENGTHS[name]
    budget = BodyBudget(max_body=100, max_held=150)
    too_large = lengths in (WRONG["24 digits"], WRONG["24 digits behind zeros"], WRONG["64 bits and more"])
    expected = (b"", PayloadTooLarge, []) if too_large else (b"abcdef", None, [3, 6])
    assert limited(lengths, [b"abc", b"def"], budget) == expected
    assert budget.held == 0
    read, error, _ = limited(lengths, [b"x" * 60, b"x" * 60], budget)
    assert (len(read), error) == (0 if too_large else 60, PayloadTooLarge)
    assert budget.held == 0
    if not too_large:
        budget.held = 100
        read, error, _ = limited(lengths, [b"x" * 40, b"x" * 40], budget)
        assert (len(read), error) == (40, Overloaded)
        assert budget.held == 100

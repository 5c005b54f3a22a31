"""What is written in one iteration of the event loop leaves in one piece, and nothing is lost or held back."""

import asyncio

import numpy as np
import pytest

from service.protocol import GATHERED_BYTES, GatheringTransport
from tests.service.http import serving


class Recorded:
    """A transport that keeps what it is told."""

    def __init__(self):
        self.told = []

    def writelines(self, parts):
        self.told.append(b"".join(parts))

    def close(self):
        self.told.append("close")

    def write_eof(self):
        self.told.append("eof")

    def is_closing(self):
        return "close" in self.told


def gathered(*calls):
    """What a transport was told after these calls on the gathering one, and after the iteration."""

    async def body():
        recorded = Recorded()
        transport = GatheringTransport(recorded, asyncio.get_running_loop())
        for name, *given in calls:
            getattr(transport, name)(*given)
        during = list(recorded.told)
        await asyncio.sleep(0)
        return during, recorded.told

    return asyncio.run(body())


def test_writes_of_one_iteration_leave_together_at_its_end():
    assert gathered(("write", b"head"), ("write", b"body")) == ([], [b"headbody"])


@pytest.mark.parametrize(("call", "told"), [("close", "close"), ("write_eof", "eof")])
def test_what_was_written_goes_before_the_end(call, told):
    during, after = gathered(("write", b"head"), ("write", b"body"), (call,))
    assert during == after == [b"headbody", told]


def test_much_is_not_held_back():
    """A stream that is written without a pause must feel how fast its reader is."""
    large = bytes(GATHERED_BYTES)
    during, after = gathered(("write", large), ("write", b"x"), ("write", b"y"))
    assert during == [large + b"x"]
    assert after == [large + b"x", b"y"]


def test_all_else_is_the_transport_s():
    async def body():
        recorded = Recorded()
        transport = GatheringTransport(recorded, asyncio.get_running_loop())
        assert not transport.is_closing()
        transport.close()
        return transport.is_closing()

    assert asyncio.run(body())


def test_an_answer_of_the_service_is_one_write(ppca_root, monkeypatch):
    told = []
    kept = GatheringTransport.flush
    monkeypatch.setattr(GatheringTransport, "flush", lambda self: told.append(list(self._parts)) or kept(self))
    with serving(ppca_root) as client:
        body = np.zeros((2, 1, 8, 8), np.uint8).tobytes()
        octets = {"content-type": "application/octet-stream"}
        answer = client.post("/v1/encode", content=iter([body]), headers=octets)  # by ASGI, which writes head and body
    assert answer.status_code == 200
    whole = [b"".join(parts) for parts in told if parts]
    assert len(whole) == 1
    assert whole[0].endswith(answer.content)

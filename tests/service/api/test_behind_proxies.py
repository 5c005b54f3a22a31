"""What proxies, probes and pages of browsers send: HEAD, a prefix, preflights, idle connections, a parameter twice."""

from __future__ import annotations

import re
import socket

import pytest

from service.commands.environment import read_settings
from service.errors import ConfigurationError
from service.server.limits import LimitedProtocol
from service.settings import Settings
from tests.service.http import assert_problem, serving
from tests.service.requests import IDLE, LEVELS, NPY, OCTETS, answers, connected, metric, post, raw, under_way, until


def test_head_is_answered_wherever_get_is(client):
    for path in ("/livez", "/readyz", "/metrics", "/v1/models", "/v1/models/ppca", "/v1/sample?seed=1", "/v1/drift"):
        for _ in range(2):
            got, head = client.get(path), client.head(path)
            assert (head.status_code, head.content) == (got.status_code, b"") == (200, b"")
            assert head.headers["content-type"] == got.headers["content-type"]
            if path != "/metrics":
                assert head.headers["content-length"] == got.headers["content-length"]
    for path in ("/docs", "/openapi.json"):
        assert client.head(path).status_code == 200
    assert (client.head("/nothing").status_code, client.head("/v1/score").status_code) == (404, 405)
    assert client.head("/v1/score").headers["allow"] == "POST"
    counted = 'vaeserve_requests_total{method="HEAD",route="/v1/drift",status="200"}'
    assert metric(client, counted) == 2


def test_a_head_keeps_its_connection_in_step(client):
    with connected(client, b"HEAD /readyz HTTP/1.1\r\nhost: x\r\n\r\n" + raw()) as (_, stream):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += stream.read(1)
        assert head.startswith(b"HTTP/1.1 200")
        assert answers(stream, 1)[0][1].startswith(b"\x93NUMPY")


@pytest.mark.parametrize("query", ["seed=1&seed=1", "seed=1&seed=2", "strict=true&seed=1&strict=false", "x=1&x=2"])
def test_a_parameter_that_is_said_twice_is_refused(client, query):
    name = query.partition("=")[0]
    for prefix in ("/v1", "/v1/models/ppca", "/v1/models/ppca/versions/1"):
        url = f"{prefix}/encode?{query}"
        answer = client.post(url, content=LEVELS[:1].tobytes(), headers={"content-type": OCTETS})
        assert assert_problem(answer, 422)["detail"] == f"'{name}' stands 2 times in the query: once is expected"
    for url in (f"/v1/sample?{query}", f"/v1/drift?{query}"):
        assert_problem(client.get(url), 422)


def test_a_query_of_very_many_parameters_is_refused(client):
    answer = client.get("/v1/sample?" + "&".join(f"{number}" for number in range(5000)))
    assert len(assert_problem(answer, 422)["errors"]) <= 20


@pytest.mark.parametrize("sent", ["", "/inspect/vae"])
def test_a_prefix_may_be_stripped_by_the_proxy_or_not(ppca_root, sent):
    with serving(ppca_root, root_path="/inspect/vae") as client:
        assert client.get(f"{sent}/readyz").status_code == 200
        assert post(client, "encode", "", OCTETS, LEVELS[:1].tobytes(), NPY).status_code == 200
        for _ in range(2):
            scored = client.post(f"{sent}/v1/score", content=LEVELS[:1].tobytes(), headers={"content-type": OCTETS})
            assert scored.status_code == 200
        page = client.get(f"{sent}/docs")
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assets = re.findall(r'(?:src|href)="([^"]+)"', page.text) + re.findall(r"url: '([^']+)'", page.text)
        assert len(assets) >= 3
        for asset in assets:
            assert asset.startswith("/inspect/vae/")
            assert client.get(sent + asset.removeprefix("/inspect/vae")).status_code == 200
        assert client.get(f"{sent}/openapi.json").json()["servers"] == [{"url": "/inspect/vae"}]
        assert metric(client, 'vaeserve_requests_total{method="POST",route="/v1/score",status="200"}') == 2
        assert client.get("/inspect/vaeser/livez").status_code == 404


@pytest.mark.parametrize("given", ["vae", "/vae/", "/", "/a b", "//", "/vae?x"])
def test_a_prefix_is_a_path(given):
    with pytest.raises(ConfigurationError, match="root_path"):
        read_settings(["--root-path", given])


def test_pages_of_no_other_origin_read_answers_unless_they_are_named(ppca_root):
    origin, ask = {"origin": "https://a.example"}, {"access-control-request-method": "POST"}
    with serving(ppca_root) as client:
        assert "access-control-allow-origin" not in client.get("/livez", headers=origin).headers
        assert client.options("/v1/score", headers={**origin, **ask}).status_code == 405
    with serving(ppca_root, cors_origins="https://a.example, https://b.example") as client:
        for name in ("a", "b"):
            origin = {"origin": f"https://{name}.example"}
            for answer in (client.get("/livez", headers=origin), client.get("/nothing", headers=origin)):
                assert answer.headers["access-control-allow-origin"] == f"https://{name}.example"
                assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
            preflight = client.options("/v1/score", headers={**origin, **ask})
            assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, origin["origin"])
            assert len(preflight.headers["x-request-id"]) == 32
        refused = client.options("/v1/score", headers={"origin": "https://c.example", **ask})
        assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (400, False)
        assert "access-control-allow-credentials" not in preflight.headers
    with serving(ppca_root, cors_origins="*") as client:
        assert client.get("/livez", headers=origin).headers["access-control-allow-origin"] == "*"


def test_an_idle_connection_is_kept_longer_than_balancers_keep_theirs(ppca_root, monkeypatch):
    kept, made = [], LimitedProtocol.connection_made

    def noted(self, transport):
        made(self, transport)
        kept.append(self.timeout_keep_alive)

    monkeypatch.setattr(LimitedProtocol, "connection_made", noted)
    with serving(ppca_root) as client:
        client.get("/livez")
    assert Settings().keep_alive_timeout == 75
    with serving(ppca_root, keep_alive_timeout=0.2) as client, connected(client, raw()) as (_, stream):
        answers(stream, 1)
        assert stream.read() == b""
        until(client, lambda: under_way(client) == IDLE)
    assert set(kept) == {75, 0.2}


def test_probes_of_old_balancers_are_answered(client):
    """HTTP/1.0, without a Host."""
    with socket.create_connection((client.base_url.host, client.base_url.port), 20) as connection:
        connection.sendall(b"HEAD /readyz HTTP/1.0\r\n\r\n")
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 200")

"""What the service shows of itself: in /readyz, in its log, in its documentation, and what of it can be turned off."""

from __future__ import annotations

import re

import numpy as np
import pytest

from service.api import middleware
from tests.ppca_bundle import write_ppca_bundle
from tests.service.http import APPS, npy, serving
from tests.service.requests import JSON, NPY, metric, post, until


def test_readyz_names_bundles_and_no_folders(tmp_path):
    root = tmp_path / "secret"
    write_ppca_bundle(root)
    write_ppca_bundle(root, version="2")
    (root / "ppca/2/extra").write_text("x")
    with serving(root, skip_broken=True) as client:
        text = client.get("/readyz").text
        assert client.get("/readyz").json()["skipped"] == {"ppca/2": "failed verification, see the log"}
    assert "secret" not in text


def test_the_scripts_of_the_documentation_are_kept_by_browsers_and_nothing_else_is(client):
    assets = re.findall(r'(?:src|href)="([^"]+)"', client.get("/docs").text)
    for asset in assets:
        answer = client.get(asset)
        assert answer.headers["cache-control"] == "public, max-age=3600"
        again = client.get(asset, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.headers["cache-control"]) == (304, "public, max-age=3600")
    for path in ("/docs", "/static-offline-docs/none.js", "/openapi.json", "/livez"):
        assert client.get(path).headers["cache-control"] == "no-store"


def test_a_line_of_the_log_names_the_client(ppca_root, monkeypatch):
    """The proxy, unless it is trusted to say who that is."""
    lines = []
    monkeypatch.setattr(middleware, "log_request", lambda **fields: lines.append(fields))

    def clients_logged(client, *paths, **headers):
        lines.clear()
        for path in paths:
            client.get(path, headers=headers)
        until(client, lambda: {line["path"] for line in lines} >= {*paths})
        return {line["client"] for line in lines if line["path"] in paths}

    paths = ("/readyz", "/nothing", "/v1/sample")
    with serving(ppca_root) as client:
        assert clients_logged(client, *paths, **{"x-forwarded-for": "192.0.2.7"}) == {"127.0.0.1"}
    with serving(ppca_root, trusted_proxies="127.0.0.0/8, 10.0.0.1") as client:
        assert clients_logged(client, *paths, **{"x-forwarded-for": "192.0.2.7"}) == {"192.0.2.7"}
        assert clients_logged(client, *paths, **{"x-forwarded-for": "8.8.8.8, 192.0.2.7, 10.0.0.1"}) == {"192.0.2.7"}
        assert clients_logged(client, *paths) == {"127.0.0.1"}
    with serving(ppca_root, trusted_proxies="10.0.0.1") as client:
        assert clients_logged(client, *paths, **{"x-forwarded-for": "192.0.2.7"}) == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("setting", "paths"),
    [
        ("metrics", ["/metrics"]),
        ("docs", ["/docs", "/openapi.json", "/static-offline-docs/swagger-ui.css"]),
        ("drift", ["/v1/drift", "/v1/models/ppca/drift", "/v1/models/ppca/versions/1/drift"]),
    ],
)
def test_what_is_turned_off_is_not_there(ppca_root, setting, paths):
    with serving(ppca_root) as client:
        assert [client.get(path).status_code for path in paths] == [200] * len(paths)
    with serving(ppca_root, **{setting: False}) as client:
        assert [client.get(path).status_code for path in paths] == [404] * len(paths)
        for _ in range(2):
            assert post(client, "score", "", NPY, npy(np.zeros((2, 1, 8, 8), np.uint8)), JSON).status_code == 200
        assert (len(list(APPS[client].state.context.drift)) == 0) == (setting == "drift")
        if setting != "metrics":
            assert metric(client, 'vaeserve_images_scored_total{model="ppca"}') == 4

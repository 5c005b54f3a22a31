"""The app around the verbs: health, error shape, request ids, limits, overload, deadlines, drain, metrics, docs."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from service.api import context
from service.api.context import dump
from service.settings import Settings
from tests.ppca_bundle import LATENT_DIM, images, write_ppca_bundle
from tests.service.http import assert_problem, npy, send_raw, serving

NPY = {"content-type": "application/x-npy"}
BODY = npy(images(3))


@pytest.fixture(scope="module")
def client(ppca_root):
    with serving(ppca_root, max_body_bytes=4096, max_batch=8, max_k=50, max_n=9, max_steps=9) as client:
        yield client


def test_a_fresh_interpreter_imports_the_app_without_torch_or_training():
    program = (
        "import sys, service.api.app, service.commands.cli, service.commands.offline_scoring, service.server.draining;"
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('torch', 'training', 'onnx', 'lightning', 'sklearn', 'matplotlib', 'scipy', 'pyarrow')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_health(client):
    assert client.get("/livez").json()["status"] == "live"
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["models"]) == (200, ["ppca/1"])


def test_not_ready_without_a_model(tmp_path):
    write_ppca_bundle(tmp_path)
    (tmp_path / "ppca/1/extra").write_text("x")
    with serving(tmp_path, skip_broken=True) as client:
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").status_code == 503
        assert_problem(client.post("/v1/score", content=BODY, headers=NPY), 404)


def test_errors_have_one_shape(client):
    assert_problem(client.get("/nothing"), 404)
    assert_problem(client.get("/v1/score/"), 404)
    response = client.get("/v1/score")
    assert_problem(response, 405)
    assert response.headers["allow"] == "POST"
    problem = assert_problem(client.get("/v1/sample", params={"n": "many", "sed": 1}), 422)
    assert {field["where"] for field in problem["errors"]} == {"query.n", "query.sed"}
    assert_problem(client.post("/v1/score", content=BODY, headers={"content-type": "text/plain"}), 415)
    assert_problem(client.post("/v1/score", content=BODY, headers={**NPY, "accept": "text/html"}), 406)


def test_request_ids_are_echoed_if_harmless_and_made_up_otherwise(client):
    assert client.get("/livez", headers={"x-request-id": "abc-1.2_Z"}).headers["x-request-id"] == "abc-1.2_Z"
    for bad in ("a b", "x" * 65, "<script>", "a,b", ""):
        given = client.get("/livez", headers={"x-request-id": bad}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", given)


def test_security_headers(client):
    for path in ("/livez", "/nothing", "/v1/models"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_docs_need_no_other_host(client):
    page = client.get("/docs")
    assert page.status_code == 200
    assets = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(assets) >= 2
    for asset in assets:
        assert asset.startswith("/")
        assert client.get(asset).status_code == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]


def test_openapi_lists_every_verb_with_its_parameters(client):
    document = client.get("/openapi.json").json()
    for verb in ("encode", "decode", "reconstruct", "interpolate", "score", "sample"):
        for prefix in ("/v1", "/v1/models/{model}", "/v1/models/{model}/versions/{version}"):
            operation = document["paths"][f"{prefix}/{verb}"]["post"]
            names = {p["name"] for p in operation.get("parameters", [])}
            assert names >= set(re.findall(r"{(\w+)}", prefix))
    score = document["paths"]["/v1/score"]["post"]
    assert {p["name"] for p in score["parameters"]} >= {"k", "estimator", "false_positive_rate", "map"}
    assert {"application/x-npy", "image/png", "multipart/form-data"} <= set(score["requestBody"]["content"])
    pair = document["paths"]["/v1/interpolate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert [body["required"] for body in pair["oneOf"]] == [["images"], ["rows"], ["latents"]]
    assert "application/json" in document["paths"]["/v1/sample"]["post"]["requestBody"]["content"]


@pytest.mark.parametrize(
    ("verb", "query", "setting"),
    [
        ("score", {"k": 51}, "max_k"),
        ("sample", {"n": 10}, "max_n"),
        ("interpolate", {"steps": 10}, "max_steps"),
        ("encode", {"samples": 257}, "max_samples"),
    ],
)
def test_limits_name_their_setting(client, verb, query, setting):
    body = npy(images(2)) if verb != "sample" else b""
    headers = NPY if verb != "sample" else {}
    problem = assert_problem(client.post(f"/v1/{verb}", params=query, content=body, headers=headers), 422)
    assert setting in problem["detail"]


@pytest.mark.parametrize(
    ("verb", "query", "each"),
    [
        ("encode", {"samples": 20}, 22 * LATENT_DIM),
        ("decode", {}, 64),
        ("reconstruct", {}, 64),
        ("interpolate", {"steps": 2}, 64 + LATENT_DIM),
        ("sample", {"n": 2}, 64 + LATENT_DIM),
        ("score", {"map": True}, 64),
    ],
)
def test_the_numbers_of_every_answer_are_limited(ppca_root, verb, query, each):
    body = npy(np.zeros((2, LATENT_DIM), np.float32) if verb == "decode" else images(2))
    request = {"params": query, "content": b"" if verb == "sample" else body, "headers": NPY}
    with serving(ppca_root, max_numbers_out=2 * each) as client:
        assert client.post(f"/v1/{verb}", **request).status_code == 200
    with serving(ppca_root, max_numbers_out=2 * each - 1) as client:
        assert "max_numbers_out" in assert_problem(client.post(f"/v1/{verb}", **request), 422)["detail"]


def test_the_work_of_a_score_is_limited_by_its_pixels(ppca_root):
    with serving(ppca_root, max_evaluated_pixels=3 * 7 * 64) as client:
        assert client.post("/v1/score", params={"k": 7}, content=BODY, headers=NPY).status_code == 200
        more = client.post("/v1/score", params={"k": 8}, content=BODY, headers=NPY)
        assert "3 images × k=8 × 64 numbers is 1536" in assert_problem(more, 422)["detail"]
        assert "setting max_evaluated_pixels" in more.json()["detail"]


def test_an_answer_of_the_most_numbers_stays_below_100_mb():
    most = Settings.model_fields["max_numbers_out"].default
    longest = np.full(2**10, -1.2345678e-10, np.float32)
    assert len(dump({"images": longest})) / len(longest) * most < 105e6


def test_pixels_of_all_images_are_limited_before_and_after_resizing(ppca_root):
    buffer = io.BytesIO()
    Image.new("L", (100, 100)).save(buffer, "PNG")
    files = [("images", ("a.png", buffer.getvalue(), "image/png"))]
    with serving(ppca_root, max_batch_pixels=20_000, max_numbers_in=5 * 64) as client:
        assert client.post("/v1/encode", files=files * 2).status_code == 200
        assert "max_batch_pixels" in assert_problem(client.post("/v1/encode", files=files * 3), 413)["detail"]
        five = np.zeros((5, 1, 8, 8), np.uint8)
        assert client.post("/v1/encode", content=npy(five), headers=NPY).status_code == 200
        six = client.post("/v1/encode", content=npy(np.zeros((6, 1, 8, 8), np.uint8)), headers=NPY)
        assert "max_numbers_in" in assert_problem(six, 413)["detail"]


def test_too_many_images_or_bytes(client):
    many = np.zeros((9, 1, 8, 8), np.uint8)
    assert "max_batch" in assert_problem(client.post("/v1/score", content=npy(many), headers=NPY))["detail"]
    latents = np.zeros((9, LATENT_DIM), np.float32)
    assert "max_batch" in assert_problem(client.post("/v1/decode", content=npy(latents), headers=NPY))["detail"]
    assert_problem(client.post("/v1/score", content=b"x" * 5000, headers=NPY), 413)
    assert_problem(client.post("/v1/score", content=iter([b"x" * 3000] * 3), headers=NPY), 413)
    assert_problem(client.post("/v1/score", content=BODY, headers={**NPY, "content-encoding": "gzip"}), 415)


def test_a_full_queue_refuses_at_once_and_liveness_does_not_care(ppca_root):
    with serving(ppca_root, concurrency=1, queue=0, max_evaluated_pixels=10**9, max_request_seconds=1e6) as client:
        slow = npy(np.zeros((60, 1, 8, 8), np.uint8))
        results: list[httpx.Response] = []

        def occupy():
            """A probe below may hold the only slot: ask until it is ours."""
            while not results or results[-1].status_code == 429:
                url = f"{client.base_url}/v1/score"
                results.append(httpx.post(url, content=slow, params={"k": 4000}, headers=NPY, timeout=120))

        thread = threading.Thread(target=occupy)
        thread.start()
        probe = {"content": npy(np.zeros((1, LATENT_DIM), np.float32)), "headers": NPY}
        while (refused := client.post("/v1/decode", **probe)).status_code == 200:
            assert thread.is_alive()
        assert_problem(refused, 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").status_code == 200
        assert thread.is_alive()  # nobody waited for the worker
        thread.join()
        assert results[-1].status_code == 200
        assert client.post("/v1/decode", **probe).status_code == 200
        values = {
            s.name: s.value for f in text_string_to_metric_families(client.get("/metrics").text) for s in f.samples
        }
        assert values["vaeserve_queue_refusals_total"] >= 1


def test_a_deadline_ends_a_request(ppca_root):
    with serving(ppca_root, request_timeout=0.05, max_evaluated_pixels=10**9, max_request_seconds=1e6) as client:
        body = npy(np.zeros((20, 1, 8, 8), np.uint8))
        slow = client.post("/v1/score", content=body, params={"k": 3000}, headers=NPY)
        assert_problem(slow, 503)
        assert "request_timeout" in slow.json()["detail"]
        assert client.get("/livez").status_code == 200


def test_half_sent_requests_are_ended(ppca_root):
    with serving(ppca_root, header_timeout=0.3, receive_timeout=0.3) as client:
        status, _, body = send_raw(client, b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-le")
        assert (status, json.loads(body)["status"]) == (408, 408)
        head = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-npy\r\ncontent-length: 900\r\n\r\n"
        status, _, body = send_raw(client, head + b"half")
        assert (status, json.loads(body)["status"]) == (408, 408)
        assert "receive_timeout" in json.loads(body)["detail"]


def test_the_bytes_of_all_bodies_held_at_once_are_bounded(ppca_root):
    with serving(ppca_root, max_buffered_bytes=2048) as client:
        head = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-npy\r\ncontent-length: 1900\r\n\r\n"
        body = npy(images(3))
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address) as holder:
            holder.sendall(head + b"x" * 1800)
            while (refused := client.post("/v1/score", content=body, headers=NPY)).status_code == 200:
                assert holder.fileno() > 0
            assert_problem(refused, 429)
            assert int(refused.headers["retry-after"]) >= 1
        while (answer := client.post("/v1/score", content=body, headers=NPY)).status_code == 429:
            assert answer.headers["retry-after"]
        assert answer.status_code == 200


def test_a_connection_that_never_speaks_is_closed(ppca_root):
    with serving(ppca_root, header_timeout=0.2) as client:
        status, _, _ = send_raw(client, b"")
        assert status == 408


def test_header_caps(client):
    many = b"".join(b"x-%d: 1\r\n" % i for i in range(200))
    for flood in (many, b"x-long: " + b"a" * 40_000 + b"\r\n", b"x-endless: " + b"a" * 200_000):
        status, head, body = send_raw(client, b"GET /livez HTTP/1.1\r\nhost: x\r\n" + flood + b"\r\n")
        assert status == 431
        assert b"application/problem+json" in head
        assert json.loads(body)["error"] == json.loads(body)["detail"]
    status, _, _ = send_raw(client, b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n")
    assert status == 431


def test_metrics_count_routes_not_paths(ppca_root):
    with serving(ppca_root) as client:
        for i in range(3):
            client.get(f"/made-up/{i}")
        client.request("BREW", "/livez")
        client.post("/v1/models/ppca/score", content=BODY, headers=NPY)
        families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
        counts = {
            (s.labels["method"], s.labels["route"], s.labels["status"]): s.value
            for s in families["vaeserve_requests"].samples
            if s.name.endswith("_total")
        }
        assert counts["GET", "unmatched", "404"] == 3
        assert counts["POST", "/v1/models/{model}/score", "200"] == 1
        assert not any("made-up" in route for _, route, _ in counts)
        values = {s.name: s.value for f in families.values() for s in f.samples}
        assert values["vaeserve_images_scored_total"] == 3
        assert values["vaeserve_p_value_count"] == 3
        assert values["vaeserve_batch_size_sum"] == 3
        assert values["vaeserve_model_info"] == 1
        assert values["vaeserve_requests_in_flight"] == 1


def _start(repository: Path, *flags: str) -> tuple[subprocess.Popen[str], str]:
    """A real ``vaeserve serve`` process and its address, once it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "service",
        "serve",
        "--repository",
        str(repository),
        "--port",
        str(port),
        *flags,
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VAESERVE_")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    base = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            if httpx.get(f"{base}/readyz").status_code == 200:
                return process, base
        except httpx.TransportError:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
    raise AssertionError("never ready")


def test_sigterm_drains_and_every_log_line_is_json(ppca_root):
    process, base = _start(ppca_root, "--drain-seconds", "1")
    httpx.get(f"{base}/livez", headers={"x-request-id": "a-known-id"})
    httpx.get(f"{base}/nothing%0aforged%1b")
    process.send_signal(signal.SIGTERM)
    while httpx.get(f"{base}/readyz").status_code == 200:
        pass
    assert httpx.post(f"{base}/v1/score", content=BODY, headers=NPY).status_code == 200
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    lines = [json.loads(line) for line in errors.splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    known = [line for line in requests if line["request_id"] == "a-known-id"]
    assert [(line["route"], line["status"], line["level"]) for line in known] == [("/livez", 200, "info")]
    assert {"ppca"} == {line["name"] for line in lines if line["event"] == "model loaded"}


@pytest.mark.parametrize(
    ("path", "query"), [("encode", ""), ("encode", "?samples=1"), ("score", ""), ("interpolate", "")]
)
def test_a_refused_body_is_let_go_with_its_answer(ppca_root, monkeypatch, path, query):
    """Not only by the next garbage collection: they come seldom, and bodies may be large."""
    calls: list[weakref.ref[context.Call]] = []
    made = context.Call.__init__
    kept_made = lambda self, *given: calls.append(weakref.ref(self)) or made(self, *given)  # noqa: E731
    monkeypatch.setattr(context.Call, "__init__", kept_made)
    gc.collect()
    gc.disable()
    try:
        with serving(ppca_root) as client:
            body = npy(np.zeros((1, 5, 16, 16), np.uint8))
            for _ in range(5):
                answer = client.post(f"/v1/{path}{query}", content=body, headers=NPY)
                assert answer.status_code == 422
            assert client.get("/livez").status_code == 200
            kept = sum(call() is not None for call in calls)
            assert len(calls) >= 5
    finally:
        gc.enable()
    assert kept <= 1  # of the connection's last


THREADS_OF_BLAS = """
import sys
from service.__main__ import main
sys.argv = ["vaeserve", "models", "--repository", sys.argv[1]]
try:
    main()
except SystemExit:
    pass
import json, threadpoolctl
print(json.dumps([found["num_threads"] for found in threadpoolctl.threadpool_info() if found["user_api"] == "blas"]))
"""


def test_linear_algebra_of_the_service_has_one_thread(ppca_root):
    """More would spin beside the requests."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    command = [sys.executable, "-c", THREADS_OF_BLAS, str(ppca_root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found
    assert set(found) == {1}


def test_a_broken_bundle_stops_the_start_with_one_clear_line(tmp_path):
    path, _ = write_ppca_bundle(tmp_path)
    (path / "decoder.onnx").write_bytes(b"no graph")
    command = [sys.executable, "-m", "service", "serve", "--repository", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "decoder.onnx" in done.stderr
    assert "Traceback" not in done.stderr

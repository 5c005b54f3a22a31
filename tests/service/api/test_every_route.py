"""Middleware and dependencies refuse every route, verb and format, whatever was answered and remembered before."""

import asyncio
import io
from typing import Annotated

import httpx
import pytest
from fastapi import APIRouter, Cookie, Depends, Header, HTTPException, Query, Request
from fastapi.responses import Response
from PIL import Image

from service.api import context
from service.api.app import create_app
from service.api.endpoint import respond
from service.api.routes import latents
from service.api.schemas import EncodeParameters
from service.errors import InvalidInput
from service.repository.model_repository import load_repository
from service.settings import Settings
from tests.service.http import APPS, npy, serving
from tests.service.requests import JSON, LATENTS, LEVELS, NPY, OCTETS, PNG, ROW, png, post


class Gate:
    """What refuses while it is closed: as middleware, and as a dependency."""

    def __init__(self):
        self.is_closed = True

    def middleware(self, app):
        """ASGI middleware that answers 401 to everything."""

        async def answer(scope, receive, send):
            if scope["type"] == "http" and self.is_closed:
                await Response(status_code=401)(scope, receive, send)
            else:
                await app(scope, receive, send)

        return answer

    async def dependency(self):
        """A dependency that raises 401."""
        if self.is_closed:
            raise HTTPException(401, "who are you?", {"www-authenticate": "Bearer"})


@pytest.fixture
def gate():
    return Gate()


def picture(form):
    buffer = io.BytesIO()
    Image.fromarray(LEVELS[0].squeeze()).convert("RGB").save(buffer, form)
    return buffer.getvalue()


FORM = "multipart/form-data; boundary=x"
PART = b'--x\r\ncontent-disposition: form-data; name="images"; filename="a.png"\r\n\r\n%b\r\n'
BODIES = {
    "multipart/form-data": PART % png(LEVELS[0]) + PART % png(LEVELS[1]) + b"--x--\r\n",
    PNG: png(LEVELS[0]),
    "image/jpeg": picture("JPEG"),
    "image/webp": picture("WEBP"),
    NPY: npy(LEVELS[:2]),
    OCTETS: LEVELS[:2].tobytes(),
    "text/csv": b"1,2\n",
    JSON: b'{"images": %b}' % str(LEVELS[:2].tolist()).encode(),
}
"""A body in every format that OpenAPI names."""
LATENT_BODIES = {NPY: npy(LATENTS[:2]), JSON: b'{"latents": %b}' % str(LATENTS[:2].tolist()).encode()}
NO_BODY = {"": b""}
VERB_COUNT = 3 * 8  # of addresses of a model by its verbs: those of POST, GET sample, and drift


def requests_of(document):
    """Every request that OpenAPI describes: (method, path, Content-Type, body, Accept), with each format."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            inputs = [*operation.get("requestBody", {}).get("content", {"": {}})]
            offers = [*operation["responses"]["200"].get("content", {JSON: {}})]
            bodies = LATENT_BODIES if path.endswith("/decode") else {**BODIES, "": b""}
            if path.endswith("/sample"):
                bodies = {JSON: b'{"n": 2}', "": b""}
            at = path.replace("{model}", "ppca").replace("{version}", "1")
            for content_type in inputs:
                for accept in offers:
                    yield method, at, content_type, bodies[content_type], accept


def ask(client, method, path, content_type, body, accept):
    headers = {"accept": accept, "content-type": FORM if content_type.startswith("multipart") else content_type}
    if not content_type:
        del headers["content-type"]
    query = "?map=true" if path.endswith("/score") and accept == PNG else ""
    return client.request(method, path + query, content=body, headers=headers).status_code


def every_request(client):
    document = APPS[client].openapi()
    asked = list(requests_of(document))
    verbs = {(method, path) for method, path, *_ in asked if path.rpartition("/")[2] in VERBS}
    assert len(verbs) == VERB_COUNT
    assert {content_type for _, _, content_type, _, _ in asked} == {*BODIES, ""}
    assert {accept for *_, accept in asked} >= {JSON, NPY, PNG, "image/gif", "image/webp"}
    return asked


VERBS = ("encode", "decode", "reconstruct", "interpolate", "score", "sample", "drift")


def test_middleware_refuses_every_request(ppca_root, gate, resolved):
    with serving(ppca_root, lambda app: app.add_middleware(gate.middleware)) as client:
        asked, endpoints = every_request(client), APPS[client].state.remembered
        for _ in range(2):
            assert {ask(client, *request) for request in asked} == {401}
            assert {client.get(path).status_code for path in ("/docs", "/openapi.json", "/nothing")} == {401}
        assert not endpoints
        assert resolved == []  # the innermost middleware has seen nothing
        gate.is_closed = False
        answered = [ask(client, *request) for request in asked for _ in range(2)]
        assert 401 not in answered
        assert max(answered) < 500
        assert answered.count(200) > len(answered) / 2
        assert len(endpoints) > VERB_COUNT - 6  # all but drift, and two more queries of score
        gate.is_closed = True
        assert {ask(client, *request) for request in asked} == {401}


def test_a_dependency_of_the_app_refuses_every_request(ppca_root, gate):
    with serving(ppca_root, dependencies=[Depends(gate.dependency)]) as client:
        asked, endpoints = every_request(client), APPS[client].state.remembered
        for _ in range(2):
            assert {ask(client, *request) for request in asked} == {401}
        gate.is_closed = False
        answered = [ask(client, *request) for request in asked]
        assert 401 not in answered
        assert max(answered) < 500
        assert answered.count(200) > len(answered) / 2
        gate.is_closed = True
        assert {ask(client, *request) for request in asked} == {401}
        assert not endpoints  # or the dependency would be skipped
        refused = post(client, "encode", "", OCTETS, ROW)
        assert (refused.json()["detail"], refused.headers["www-authenticate"]) == ("who are you?", "Bearer")


def by_route(gate):
    router = APIRouter()

    @router.post("/encode", dependencies=[Depends(gate.dependency)])
    async def encode(request: Request, query: Annotated[EncodeParameters, Query()]) -> Response:
        return respond(request, latents.ENCODE, query)

    return router


def by_router(gate):
    router = APIRouter(dependencies=[Depends(gate.dependency)])

    @router.post("/encode")
    async def encode(request: Request, query: Annotated[EncodeParameters, Query()]) -> Response:
        return respond(request, latents.ENCODE, query)

    return router


def by_parameter(gate):
    router = APIRouter()

    @router.post("/encode")
    async def encode(
        request: Request, query: Annotated[EncodeParameters, Query()], caller: Annotated[None, Depends(gate.dependency)]
    ) -> Response:
        return respond(request, latents.ENCODE, query)

    return router


def by_dependency_of_a_dependency(gate):
    router = APIRouter()

    async def caller(nobody: Annotated[None, Depends(gate.dependency)]) -> None: ...

    @router.post("/encode")
    async def encode(
        request: Request, query: Annotated[EncodeParameters, Query()], caller: Annotated[None, Depends(caller)]
    ) -> Response:
        return respond(request, latents.ENCODE, query)

    return router


@pytest.mark.parametrize("guarded", [by_route, by_router, by_parameter, by_dependency_of_a_dependency])
@pytest.mark.parametrize("at", ["/v1", "/v1/models/ppca", "/v1/models/ppca/versions/1"])
def test_a_dependency_of_a_route_is_never_skipped(ppca_root, monkeypatch, gate, guarded, at):
    monkeypatch.setattr(latents, "router", guarded(gate))
    with serving(ppca_root) as client:
        for is_closed in (True, False, False, True, True):
            gate.is_closed = is_closed
            answer = post(client, "encode", "", OCTETS, ROW, at=at)
            assert answer.status_code == (401 if is_closed else 200), answer.text


@pytest.mark.parametrize("kind", [Header, Cookie])
def test_what_a_route_reads_beside_its_query_is_looked_at_in_each_request(ppca_root, monkeypatch, kind):
    router = APIRouter()

    @router.post("/encode")
    async def encode(
        request: Request, query: Annotated[EncodeParameters, Query()], key: Annotated[str, kind(max_length=3)]
    ) -> Response:
        return respond(request, latents.ENCODE, query)

    monkeypatch.setattr(latents, "router", router)
    with serving(ppca_root) as client:
        for key, status in (("abc", 200), ("abc", 200), ("abcd", 422)):
            headers = {"key": key} if kind is Header else {"cookie": f"key={key}"}
            assert post(client, "encode", "", OCTETS, ROW, **headers).status_code == status


def test_a_dependency_that_is_replaced_is_never_skipped(ppca_root, gate):
    async def default(request: Request, served: Annotated[None, Depends(context.find_default)]) -> None:
        await gate.dependency()

    def replace(app):
        app.dependency_overrides[context.find_latest] = default

    with serving(ppca_root, replace) as client:
        for is_closed in (True, False, False, True, True):
            gate.is_closed = is_closed
            assert post(client, "encode", "", OCTETS, ROW).status_code == (401 if is_closed else 200)


def test_a_dependency_that_is_replaced_later_is_not_skipped(ppca_root, gate):
    async def replaced(request: Request, served: Annotated[None, Depends(context.find_default)]) -> None:
        await gate.dependency()

    with serving(ppca_root) as client:
        assert [post(client, "encode", "", OCTETS, ROW).status_code for _ in range(2)] == [200, 200]
        APPS[client].dependency_overrides[context.find_latest] = replaced
        assert post(client, "encode", "", OCTETS, ROW).status_code == 401


@pytest.mark.parametrize("is_async", [True, False])
def test_errors_of_repeated_requests_go_to_the_handlers_of_the_app(ppca_root, is_async):
    def answer(request, error):
        return Response(str(error), 418)

    async def answer_soon(request, error):
        return answer(request, error)

    def handle(app):
        app.add_exception_handler(InvalidInput, answer_soon if is_async else answer)

    with serving(ppca_root, handle) as client:
        for body, status in ((ROW, 200), (ROW[1:], 418), (ROW, 200), (ROW[1:], 418)):
            assert post(client, "encode", "", OCTETS, body).status_code == status


def test_middleware_reads_the_same_scope_of_every_request(ppca_root):
    scopes = []

    def middleware(app):
        async def answer(scope, receive, send):
            await app(scope, receive, send)
            scopes.append({name: scope.get(name) for name in ("route", "endpoint", "path_params")})

        return answer

    with serving(ppca_root, lambda app: app.add_middleware(middleware)) as client:
        for _ in range(3):
            assert post(client, "encode", "", OCTETS, ROW).status_code == 200
    assert scopes[0] == scopes[1] == scopes[2]
    assert scopes[0]["path_params"] == {"model": "ppca"}


def test_where_telemetry_names_routes_every_request_takes_the_router(ppca_root, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "vaeserve")
    app = create_app(Settings(repository=ppca_root))
    assert not app.state.remembers


def test_what_is_remembered_ends_with_the_lifespan_of_the_app(ppca_root, all_are_long):
    settings = Settings(repository=ppca_root)
    app = create_app(settings, load_repository(settings))

    async def twice():
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x") as client,
        ):
            headers = {"content-type": OCTETS}
            answers = [await client.post("/v1/encode", content=ROW, headers=headers) for _ in range(2)]
            return [answer.status_code for answer in answers], len(app.state.remembered)

    assert asyncio.run(twice()) == asyncio.run(twice()) == ([200, 200], 1)

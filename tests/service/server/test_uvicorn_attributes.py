"""service/server/limits.py uses attributes that uvicorn and httptools do not document: each is named, and is there."""

from __future__ import annotations

import ast
import asyncio
import inspect

import httptools
import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service.server import limits

OVERRIDDEN = {
    "connection_made",
    "connection_lost",
    "data_received",
    "eof_received",
    "pause_writing",
    "resume_writing",
    "on_message_begin",
    "on_headers_complete",
    "on_message_complete",
    "on_response_complete",
    "shutdown",
}
"""Methods of HttpToolsProtocol that the event loop, the parser, a finished answer and the ending server call."""
PROTOCOL = {
    "_unset_keepalive_if_required",
    "client",
    "cycle",
    "flow",
    "headers",
    "loop",
    "parser",
    "pipeline",
    "timeout_keep_alive",
    "timeout_keep_alive_handler",
    "timeout_keep_alive_task",
    "transport",
    "url",
}
CYCLE = {"disconnected", "message_event", "response_complete", "response_started", "scope"}
FLOW = {"read_paused", "resume_reading"}
PARSER = {"feed_data", "get_http_version", "get_method", "set_dangerous_leniencies", "should_upgrade"}
HTTPTOOLS = {"HttpParserError", "HttpParserUpgrade", "HttpRequestParser"}


class Silent(asyncio.Transport):
    """A transport on which nothing is sent."""

    def is_closing(self):
        return False

    def write(self, data): ...

    def pause_reading(self): ...

    def resume_reading(self): ...


async def app(scope, receive, send):
    """Answers nothing."""
    await asyncio.Event().wait()


@pytest.fixture
def connection():
    """uvicorn's protocol of a connection on which one request and half of another have arrived, and its FlowControl."""

    async def made():
        config = uvicorn.Config(app, lifespan="off", log_config=None)
        protocol = HttpToolsProtocol(config=config, server_state=ServerState(), app_state={})
        protocol.connection_made(Silent())
        protocol.data_received(b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc")
        waiting = protocol.cycle
        protocol.data_received(b"POST /b HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\na")
        assert waiting is not protocol.cycle
        for task in protocol.tasks:
            task.cancel()
        return protocol

    return asyncio.run(made())


def used(name, tree=ast.parse(inspect.getsource(limits))):  # noqa: B008 - read once
    """Attributes of what is called ``name`` (``self.parser``, say) in limits.py."""
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == name}


def own(cls):
    """Attributes that a class of limits.py defines: methods, annotated ones, and what its methods set."""
    tree = ast.parse(inspect.getsource(cls)).body[0]
    methods = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    annotated = {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    stored = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    return methods | annotated | stored


def used_in(cls, name):
    return used(name, ast.parse(inspect.getsource(cls)))


def test_every_attribute_of_uvicorn_and_httptools_that_is_used_is_named_and_is_there(connection):
    """An upgrade that takes one away must be seen here, and not as a limit that has no effect any more."""
    protocol = limits.LimitedProtocol
    inherited = used_in(protocol, "self") - (own(protocol) - PROTOCOL - OVERRIDDEN)
    assert inherited - OVERRIDDEN == PROTOCOL
    assert vars(HttpToolsProtocol).keys() >= used_in(protocol, "super()")
    assert used("cycle") | used("self.cycle") == CYCLE
    assert used("self.flow") - own(limits.PipelineFlow) | used_in(limits.PipelineFlow, "super()") == FLOW
    assert used("self.parser") == PARSER
    assert used("httptools") == HTTPTOOLS

    for name in PROTOCOL:
        getattr(connection, name)
    for name in CYCLE:
        getattr(connection.cycle, name)
    for name in FLOW:
        getattr(connection.flow, name)
    for name in PARSER:
        getattr(connection.parser, name)
    for name in HTTPTOOLS:
        getattr(httptools, name)
    assert own(protocol) & {*dir(HttpToolsProtocol)} >= OVERRIDDEN
    assert vars(HttpToolsProtocol).keys() >= OVERRIDDEN
    assert own(limits.PipelineFlow) & vars(FlowControl).keys() - {"__init__"} == {"resume_reading"}

    # What they mean: requests that wait are (cycle, app) in the pipeline, the newest first, and reading is paused.
    ((waiting, _),) = connection.pipeline
    assert waiting is connection.cycle
    assert connection.flow.read_paused is True
    assert isinstance(connection.flow, FlowControl)
    assert (connection.cycle.response_started, connection.cycle.response_complete) == (False, False)
    assert (connection.url, connection.headers) == (b"/b", connection.scope["headers"])

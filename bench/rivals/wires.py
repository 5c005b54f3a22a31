"""How images go to a server and latents come back: the bytes of a request, and what an answer says of loc."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from bench.bodies import FORMATS
from bench.load import http_request
from bench.raw import to_unit
from bench.requests import request

TENSOR = "x"


@dataclass(frozen=True)
class Wire:
    """``name``: JSON or binary. ``ask``: uint8 pixels [N,C,H,W] -> an HTTP request. ``loc``: the body of its answer and
    the latent size -> float32 [N,L]."""

    name: str
    ask: Callable[[np.ndarray], bytes]
    loc: Callable[[bytes, int], np.ndarray]


def _numbers(x: np.ndarray) -> bytes:
    return orjson.dumps({"images": x}, option=orjson.OPT_SERIALIZE_NUMPY)


def plain_json(path: str) -> Wire:
    """{"images": numbers} in, {"loc": numbers, "scale": numbers} out."""
    return Wire(
        "JSON",
        lambda pixels: http_request("POST", path, {"content-type": "application/json"}, _numbers(to_unit(pixels))),
        lambda body, latent_dim: np.asarray(json.loads(body)["loc"], np.float32),
    )


def side_by_side(path: str) -> Wire:
    """As ``plain_json``, answered by one array [N,2L] of loc and scale."""
    return Wire(
        "JSON", plain_json(path).ask, lambda body, latent_dim: np.asarray(json.loads(body), np.float32)[:, :latent_dim]
    )


def _tensor(pixels: np.ndarray) -> dict[str, Any]:
    return {"name": TENSOR, "shape": list(pixels.shape), "datatype": "FP32"}


def _document_loc(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(output for output in document["outputs"] if output["name"] == "loc")
    return found


def inference_json(path: str) -> Wire:
    """Open Inference Protocol v2 in JSON."""

    def ask(pixels: np.ndarray) -> bytes:
        content = {"inputs": [_tensor(pixels) | {"data": to_unit(pixels).ravel()}]}
        body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
        return http_request("POST", path, {"content-type": "application/json"}, body)

    def loc(body: bytes, latent_dim: int) -> np.ndarray:
        return np.asarray(_document_loc(json.loads(body))["data"], np.float32).reshape(-1, latent_dim)

    return Wire("JSON", ask, loc)


def inference_binary(path: str) -> Wire:
    """Its binary extension: a JSON head, then the tensors' bytes."""

    def ask(pixels: np.ndarray) -> bytes:
        data = to_unit(pixels).tobytes()
        tensor = _tensor(pixels) | {"parameters": {"binary_data_size": len(data)}}
        head = orjson.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}})
        headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
        return http_request("POST", path, headers, head + data)

    def loc(body: bytes, latent_dim: int) -> np.ndarray:
        document, start = json.JSONDecoder().raw_decode(body.decode("latin-1"))
        for output in document["outputs"]:
            size = output["parameters"]["binary_data_size"]
            if output["name"] == "loc":
                break
            start += size
        return np.frombuffer(body[start : start + size], np.float32).reshape(-1, latent_dim)

    return Wire("binary", ask, loc)


def ours(model: str) -> tuple[Wire, Wire]:
    """vaeserve's: JSON in and out; uint8 in and npy out."""
    path = f"/v1/models/{model}/encode"

    def npy(body: bytes, latent_dim: int) -> np.ndarray:
        found: np.ndarray = np.load(io.BytesIO(body))
        return found

    as_json = Wire(
        "JSON",
        lambda pixels: request(path, "json", *FORMATS["json numbers"](pixels)),
        lambda body, latent_dim: np.asarray(json.loads(body)["loc"], np.float32),
    )
    return as_json, Wire("binary", lambda pixels: request(path, "npy", *FORMATS["octet-stream"](pixels)), npy)

"""Random requests to the service, each drawn from (seed, index) alone: good ones, odd ones and bad ones.

They address what the manifests of a folder of bundles name: every verb of every model by all its addresses, in every
input format, with every kind of answer and all parameters, some of them wrong; bodies of tests/hostile.py; and other
paths and methods.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from bench.random_bodies import JSON, NPY, OCTETS, Bodies, Model

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Request:
    """One request; ``kind`` is its verb, or what else it is, and the format of its body."""

    index: int
    kind: tuple[str, str]
    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes = b""
    is_chunked: bool = False

    def __str__(self) -> str:
        shown = ", ".join(f"{name}: {value[:60]}" for name, value in self.headers)
        how = " in chunks" if self.is_chunked else ""
        return f"{self.index}: {self.method} {self.path[:300]} ({shown}; {len(self.body)} bytes{how}, {self.kind[1]})"


SEEDS: tuple[Value, ...] = (0, 1, 7, 2**32 - 1)
BOOLEANS: tuple[Value, ...] = (True, False)
COMMON = {"seed": (SEEDS, (-1, 2**32, "one", 1.5, ""))}
DRAW = {"draw": (BOOLEANS, ("maybe", 2))}
STRICT = {"strict": (BOOLEANS, ("maybe", 2))}
Choices = dict[str, tuple[tuple[Value, ...], tuple[Value, ...]]]
"""Of each parameter its good values, and its bad ones."""
PARAMETERS: dict[str, Choices] = {
    "encode": {**COMMON, **STRICT, "samples": ((0, 1, 3, 16), (-1, 257, "many")),
               "array": (("loc", "scale", "samples"), ("mean",))},
    "decode": {**COMMON, **DRAW},
    "reconstruct": {**COMMON, **STRICT},
    "sample": {**COMMON, **DRAW, "n": ((1, 2, 5, 16), (0, 257, "x", -3)),
               "temperature": ((0, 0.5, 1.0, 10), (-0.1, 10.5, "nan", "inf"))},
    "interpolate": {**COMMON, **DRAW, **STRICT, "steps": ((2, 3, 8, 17), (1, 257, "few")),
                    "mode": (("lerp", "slerp"), ("linear",))},
    "score": {
        **STRICT,
        "seed": ((0, 1, 5, 2**32 - 1), (-1, 2**32, "one")),
        "k": ((1, 2, 8, 32), (0, -1, 5001, "all", 1.5)),
        "estimator": (("elbo", "iwae", "reconstruction", "rate"), ("typicality", "none")),
        "false_positive_rate": ((0.01, 0.05, 0.5), (0, 1, "nan", -1)),
        "false_discovery_rate": ((0.05, 0.2), (0, 1, "x")),
        "map": (BOOLEANS, ("maybe",)),
        "map_kind": (("anomaly", "distortion", "corruption"), ("heat",)),
        "map_picture": (("heat-map", "overlay"), ("none",)),
        "top_latents": ((0, 1, 5, 200), (-1, 4097)),
        "group": (("front",), ("", "g" * 300)),
    },
    "drift": {"group": (("front",), ("g" * 300,))},
}  # fmt: skip
VERBS = {"score": 34, "encode": 24, "reconstruct": 12, "decode": 12, "interpolate": 10, "sample": 8}
"""Weights."""
NUMBERS = (
    None,
    None,
    "*/*",
    JSON,
    JSON,
    NPY,
    NPY,
    f"{JSON};q=0.2, {NPY};q=0.9",
    f"text/html, {JSON};q=0.1",
    NPY.upper(),
)
PICTURES = ("image/png", "image/png", "image/*", "application/*;q=0.5, image/png", "*/*;q=0.1, image/png;q=zero")
MOVING = ("image/gif", "image/webp")
ODD_ACCEPTS = (*PICTURES, *MOVING, "text/html", f"{NPY};q=0", "", ",")
"""Of the Accept header; ODD_ACCEPTS are mostly refused."""
SHARE_TWINS = 0.12


def draw_request(seed: int, index: int, models: Sequence[Model], default: str) -> Request:
    """The request of that number; ``default``: the model that /v1/… addresses.

    Some are the one before them with another body of the same length: what a service remembers of a request by its head
    must not be taken for what the next one holds.
    """
    draw = _Draw(seed, index, models, default)
    return (
        draw.request()
        if draw.random.random() > SHARE_TWINS
        else draw.twin(draw_request(seed, index - 1, models, default))
    )


class _Draw(Bodies):
    """The random choices of one request."""

    def __init__(self, seed: int, index: int, models: Sequence[Model], default: str) -> None:
        super().__init__(f"{seed}/{index}")
        self.index, self.models, self.default = index, models, default

    def request(self) -> Request:
        """Mostly a verb's."""
        kind = self.of({"verb": 90, "other": 5, "astray": 5})
        if kind == "verb":
            return self.verb(self.of(VERBS))
        return self.other() if kind == "other" else self.astray()

    def twin(self, request: Request) -> Request:
        """That request once more: with the same body, with one byte of it that is another, or with its end reversed."""
        body, half = request.body, len(request.body) // 2
        at = self.random.randrange(len(body)) if body else 0
        other = body[:at] + bytes([self.random.randrange(256)]) + body[at + 1 :] if body else body
        return replace(
            request, index=self.index, body=self.random.choice([body, other, body[:half] + body[half:][::-1]])
        )

    # Requests

    def verb(self, verb: str) -> Request:
        """A verb of a model."""
        model, prefix = self.address()
        method = self.random.choice(["GET", "POST"]) if verb == "sample" else "POST"
        parameters = self.parameters(verb, model)
        form, content_type, body = self.body(verb, method, model)
        if content_type == JSON and self.random.random() < 0.4:
            parameters, body = self.beside(parameters, body)
        query = f"?{urlencode(parameters)}" if parameters else ""
        return self.finished((verb, form), method, f"{prefix}/{verb}{query}", content_type, body)

    def other(self) -> Request:
        """What is no verb: health, models, drift."""
        model, prefix = self.address()
        path = self.random.choice(["/livez", "/readyz", "/v1/models", prefix, f"{prefix}/drift", "/v1/drift"])
        kind = "drift" if path.endswith("drift") else "other"
        if kind == "drift":
            path += f"?{urlencode(self.parameters('drift', model))}"
        return self.finished((kind, "none"), "GET", path, "", b"")

    def astray(self) -> Request:
        """A path or a method that is none."""
        model, prefix = self.address()
        verb = self.of(VERBS)
        paths = [
            *(f"/v1/models/{name}/{verb}" for name in ("none", model.name.upper(), "..", "%2e%2e", "a" * 300, "%00")),
            *(f"/v1/models/{model.name}/versions/{version}/{verb}" for version in ("0", "99", "latest", "-1", "01")),
            *(f"{prefix}/{verb}/", f"{prefix}//{verb}", f"{prefix}/{verb.upper()}", f"{prefix}/{verb}s", "/v1/", "/v2"),
            *("/", "/v1/models/", "/metrics/", "/favicon.ico", f"{prefix}/versions/{model.version}/{verb}"),
        ]
        methods = ["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE"]
        if self.random.random() < 0.5:
            return self.finished(("astray", "path"), "POST", self.random.choice(paths), *self.octets(model, 1)[1:])
        return self.finished(("astray", "method"), self.random.choice(methods), f"{prefix}/{verb}", "", b"")

    def finished(self, kind: tuple[str, str], method: str, path: str, content_type: str, body: bytes) -> Request:
        """With its headers."""
        headers = {"accept": self.accept(kind[0]), "content-type": self.typed(content_type)}
        if self.random.random() < 0.15:
            headers["x-request-id"] = self.random.choice(["abc-1.2_3", "x" * 64, "x" * 65, "a b", "é", ""])
        if self.random.random() < 0.01:
            headers["content-encoding"] = self.random.choice(["gzip", "identity", "br"])
        if self.random.random() < 0.02:
            headers["connection"] = "close"
        given = tuple((name, value) for name, value in headers.items() if value is not None)
        return Request(self.index, kind, method, path, given, body, bool(body) and self.random.random() < 0.12)

    def accept(self, verb: str) -> str | None:
        """What the verb may answer; now and then something else."""
        offers = NUMBERS + PICTURES * (verb in ("reconstruct", "decode", "sample", "interpolate"))
        offers += MOVING * (verb == "interpolate")
        return self.random.choice(ODD_ACCEPTS if self.is_bad() else offers)

    def typed(self, content_type: str) -> str | None:
        """The Content-Type, now and then written otherwise, or another."""
        if self.random.random() < 0.06:
            return self.random.choice([None, "", "text/plain", JSON, OCTETS, NPY, "image/png"])
        if content_type and self.random.random() < 0.08:
            return self.random.choice([f"{content_type}; charset=utf-8", content_type.swapcase(), f" {content_type} "])
        return content_type or None

    # Addresses and parameters

    def address(self) -> tuple[Model, str]:
        """A model, and one of its addresses."""
        model = self.random.choices(self.models, [1 + 2 * (each.kind == "image") for each in self.models])[0]
        newest = {each.name: each for each in self.models}  # they are sorted
        kind = self.of({"latest": 45, "version": 30, "default": 25})
        if kind == "version":
            return model, f"/v1/models/{model.name}/versions/{model.version}"
        model = newest[model.name if kind == "latest" else self.default]
        return model, f"/v1/models/{model.name}" if kind == "latest" else "/v1"

    def parameters(self, verb: str, model: Model) -> list[tuple[str, Any]]:
        """Names and values as a query has them."""
        choices = dict(PARAMETERS[verb])
        if verb in ("score", "drift"):
            choices["score"] = (model.scores, ("none", "s" * 70))
        if verb == "score":
            some = ",".join(self.random.sample(model.scores, min(2, len(model.scores))))
            choices["also"] = (("all", some, model.scores[0]), ("none", ",", ""))
        names = [name for name in choices if self.random.random() < min(0.3, 1.5 / len(choices))]
        if "group" in names and self.random.random() < 0.8:  # no bundle here has groups
            names.remove("group")
        said = [(name, self.random.choice(choices[name][self.is_bad()])) for name in names]
        if {"map_kind", "map_picture"} & set(names) and "map" not in names and self.random.random() < 0.8:
            said.append(("map", True))
        if self.random.random() < 0.02:
            said.append(("unknown", 1))
        if said and self.random.random() < 0.03:
            said.append(said[0])
        return [(name, str(value).lower() if isinstance(value, bool) else value) for name, value in said]

    def beside(self, parameters: list[tuple[str, Any]], body: bytes) -> tuple[list[tuple[str, Any]], bytes]:
        """Some of the parameters in the JSON object instead, now and then in both."""
        try:
            document = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            return parameters, body
        if not isinstance(document, dict):
            return parameters, body
        inside = [pair for pair in parameters if self.random.random() < 0.7]
        outside = [pair for pair in parameters if pair not in inside or self.random.random() < 0.1]
        values = {"true": True, "false": False}
        document |= {name: values.get(value, value) for name, value in inside}
        return outside, json.dumps(document).encode()

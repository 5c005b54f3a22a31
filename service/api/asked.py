"""What a path and a query ask for, looked up once and remembered: which verb of which model, with which parameters."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.datastructures import QueryParams

from service.api.context import House, Verb
from service.api.light import are_few
from service.errors import VaeserveError
from service.repository.model_repository import Served
from service.repository.score_parameters import Parameters

MOST_KNOWN = 512
MOST_QUERY_BYTES = 256
VERSIONED = "/v1/models/{model}/versions/{version}"


class Asked(NamedTuple):
    """A place and a query that are known: of which model which verb with which parameters.

    ``route`` is what FastAPI would have found; ``much`` whether the parameters alone ask for more than a moment's work;
    ``numbers`` how many a row of the model has; ``rows`` how many are asked for without a body, None with one.
    """

    served: Served
    verb: Verb
    query: Parameters
    route: APIRoute
    much: bool
    numbers: int
    rows: int | None


class Addresses:
    """The places of ``fastapi`` where one of ``verbs`` is asked for."""

    def __init__(self, fastapi: FastAPI, verbs: Iterable[Verb]) -> None:
        self.fastapi = fastapi
        self._verbs = {(verb.method, verb.name): verb for verb in verbs}
        self._routes: Mapping[tuple[str, str], APIRoute] = {}
        self._house: House | None = None
        self._known: OrderedDict[tuple[str, str, bytes], Asked] = OrderedDict()

    @property
    def house(self) -> House:
        """The app's parts, once it has started."""
        assert self._house is not None
        return self._house

    @property
    def is_open(self) -> bool:
        """Whether it has."""
        return self._house is not None

    def open(self, house: House) -> None:
        """These are the parts of the app from now on."""
        self._house = house

    def find(self, method: str, path: str, query: bytes) -> Asked | None:
        """What is asked, remembered by method, path and query string; None where FastAPI is to answer, or refuse."""
        key = method, path, query
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            return known
        found = self._find(*key)
        if found is not None:
            self._known[key] = found
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        return found

    def _find(self, method: str, path: str, text: bytes) -> Asked | None:
        *place, name = path.split("/")
        verb = self._verbs.get((method, name))
        query = None if verb is None else _query(verb, text)
        if verb is None or query is None:
            return None
        repository = self.house.repository
        try:
            match place:
                case ["", "v1", "models", model]:
                    served, template = repository.get(model), f"/v1/models/{{model}}/{name}"
                case ["", "v1", "models", model, "versions", version]:
                    served, template = repository.get(model, version), f"{VERSIONED}/{name}"
                case ["", "v1"]:
                    served, template = repository.get(), f"/v1/{name}"
                case _:
                    return None
        except VaeserveError:
            return None  # FastAPI finds the same, and says so
        numbers = math.prod(served.manifest.preprocessing.shape)
        rows = None if verb.rows is None else verb.rows(query)
        much = _asks_for_much(served, verb, query) or not are_few(getattr(query, "steps", 0), numbers)
        return Asked(served, verb, query, self._route(method, template), much, numbers, rows)

    def _route(self, method: str, template: str) -> APIRoute:
        """The route that FastAPI would have found: it names the request in metrics and log."""
        if not self._routes:
            routes = [route for route in self.fastapi.routes if isinstance(route, APIRoute)]
            self._routes = {(method, route.path): route for route in routes for method in route.methods or ()}
        return self._routes[method, template]


def _query(verb: Verb, text: bytes) -> Parameters | None:
    """The query's parameters; None for those that FastAPI is to look at."""
    items = QueryParams(text).multi_items()
    if len(text) > MOST_QUERY_BYTES or len(dict(items)) < len(items):
        return None
    try:
        return verb.query.model_validate(dict(items))
    except ValidationError:
        return None


def _asks_for_much(served: Served, verb: Verb, query: Parameters) -> bool:
    """Whole images, an answer of many numbers, or noise for every row."""
    names = ("samples", "map", "top_latents") if verb.rows is None else ("draw",)
    return served.tiled is not None or any(getattr(query, name, 0) for name in names)

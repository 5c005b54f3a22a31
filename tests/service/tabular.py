"""The linear models of vectors and signals as a repository, rows of them, and requests with these rows."""

from __future__ import annotations

import csv
import io
from typing import Any

import httpx
import numpy as np

from tests.service import linear_bundles as linear
from tests.service.http import npy

NPY, JSON, CSV = "application/x-npy", "application/json", "text/csv"
MODELS = {"table": linear.TABLE, "mixture": linear.MIXTURE, "pca": linear.PCA, "whitening": linear.WHITENING}
NATURAL = {"table": (4,), "mixture": (2, 6), "pca": (5,), "whitening": (3,)}
"""Natural shape of a row of each model."""


def x_of(name: str, n: int = 5) -> np.ndarray:
    """Rows as graphs see them, float32 [n,C,H,W]."""
    return linear.draw(MODELS[name], n, seed=11)


def rows_of(name: str, n: int = 5) -> np.ndarray:
    """The same rows in their natural shape."""
    return x_of(name, n).reshape(n, *NATURAL[name])


def post(
    client: httpx.Client, name: str, verb: str, array: np.ndarray, accept: str = JSON, /, **query: Any
) -> httpx.Response:
    """Post an array as npy to a verb of a model."""
    headers = {"content-type": NPY, "accept": accept}
    return client.post(f"/v1/models/{name}/{verb}", content=npy(array), headers=headers, params=query)


def from_npy(response: httpx.Response) -> np.ndarray:
    """Read an npy answer, which must be a success."""
    assert response.status_code == 200, response.text
    return np.load(io.BytesIO(response.content), allow_pickle=False)


def as_csv(rows: np.ndarray, header: list[str] | None = None, line_end: str = "\r\n") -> str:
    """Rows as CSV, with every digit that float32 has."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator=line_end)
    if header:
        writer.writerow(header)
    writer.writerows([[f"{value:.9g}" for value in row] for row in rows])
    return stream.getvalue()

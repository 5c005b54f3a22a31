"""What `make image-check` asks of a served model suits what the model is of; the image itself is not built here."""

import importlib.util
from pathlib import Path

import pytest

from tests.ppca_bundle import write_ppca_bundle
from tests.service.http import serving
from tests.service.linear_bundles import write_mixture, write_table

SCRIPT = Path(__file__).parents[1] / "deploy/check_image.py"


@pytest.fixture(scope="module")
def check_image():
    spec = importlib.util.spec_from_file_location("check_image", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_images_tables_and_signals_are_each_sent_what_they_read(check_image, tmp_path, capsys):
    for write in (write_ppca_bundle, write_table, write_mixture):
        write(tmp_path)
    check = check_image.Checks()
    with serving(tmp_path) as client:
        models = client.get("/v1/models").json()["models"]
        assert {model["kind"] for model in models} == {"image", "vector", "signal"}
        for model in models:
            check_image.check_scores(str(client.base_url).rstrip("/"), model["name"], check)
    said = capsys.readouterr().out
    assert check.ok, said
    assert said.count("ok  ") == 4

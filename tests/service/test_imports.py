"""What serving need not import, and what that must not change."""

import json
import subprocess
import sys

import pytest

BEFORE = """
import service.server.nursery, service.inference.model, service.bundle.manifest, service.logs
import service.server.forker, sys, json
print(json.dumps(sorted(sys.modules)))
"""

DOCUMENT = """
import json, sys
from pydantic import BaseModel
if sys.argv[1] == "later":
    from service.imports import import_fastapi
    import_fastapi()
    import fastapi.openapi.models as models
    assert not models.OpenAPI.__pydantic_complete__
    class Ours(BaseModel):
        x: int
    assert Ours.__pydantic_complete__
from service.api.app import create_app
from service.settings import Settings
print(json.dumps(create_app(Settings(), object()).openapi(), sort_keys=True))
"""

HIDDEN = """
import sys
from service.imports import hidden
with hidden("json"):
    try:
        import json
    except ImportError:
        print("hidden")
import json
with hidden("json"):
    import json as again
print(again is json)
"""


def said(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


@pytest.mark.parametrize("package", ["rich", "pydantic_settings", "typer", "fastapi"])
def test_a_nursery_begins_without(package):
    assert package not in json.loads(said(BEFORE))


def test_the_models_of_openapi_that_are_built_later_make_the_same_document():
    assert said(DOCUMENT, "later") == said(DOCUMENT, "at once")


def test_a_hidden_package_is_missing_for_as_long_as_that_and_one_that_is_there_stays():
    assert said(HIDDEN).split() == ["hidden", "True"]

"""Defaults, then a TOML preset with only the differences, then flags, then ``--set a.b=value``: one Config."""

from __future__ import annotations

import difflib
import itertools
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from training.config.run import Config
from training.errors import ConfigError


def presets() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("training") / "configs"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def is_own_file(preset: str) -> bool:
    """Whether that is a user's own .toml file, not the name of a shipped preset."""
    return Path(preset).suffix == ".toml"


def read_preset(name: str) -> dict[str, Any]:
    """A shipped preset by name, or any .toml file by path. Raises ConfigError."""
    try:
        if is_own_file(name):
            return tomllib.loads(Path(name).read_text())
        if name not in presets():
            raise ConfigError(
                f"unknown preset {name!r}: expected one of {', '.join(presets())}{_nearest(name, presets())}"
            )
        return tomllib.loads((resources.files("training") / "configs" / f"{name}.toml").read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"preset {name!r} cannot be read: {error}") from error


def summary_of(preset: str) -> str:
    """What a shipped preset is: the first sentence of the comment that it begins with."""
    text = (resources.files("training") / "configs" / f"{preset}.toml").read_text()
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return re.split(r"(?<=\.)\s", " ".join(line.removeprefix("#").strip() for line in comment))[0]


def parse_override(text: str) -> tuple[list[str], Any]:
    """``a.b=value`` -> (["a", "b"], value), the value in TOML; a bare word is a string. Raises ConfigError."""
    key, separator, value = text.partition("=")
    if not separator or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"--set {text!r}: expected section.key=value, for example model.latent_dim=16")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    return [part.strip() for part in key.split(".")], parsed


def merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` laid over ``base``, table by table; neither is modified."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def override_tree(overrides: Iterable[str]) -> dict[str, Any]:
    """What ``--set`` overrides say, one laid over the other. Raises ConfigError."""
    tree: dict[str, Any] = {}
    for text in overrides:
        keys, value = parse_override(text)
        for key in reversed(keys):
            value = {key: value}
        tree = merge(tree, value)
    return tree


def chosen_keys(preset: str | None, overrides: Iterable[str]) -> frozenset[str]:
    """Dotted keys that the user set: in a .toml file of their own, or by ``--set`` in any form. Raises ConfigError.

    A shipped preset's values are defaults, which nobody set.
    """
    own = read_preset(preset) if preset and is_own_file(preset) else {}
    return frozenset(_leaves(merge(own, override_tree(overrides))))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def load_config(preset: str | None = None, overrides: Iterable[str] = (), base: dict[str, Any] | None = None) -> Config:
    """Defaults, then the preset, then ``base`` (flags of the command line), then ``--set`` overrides.

    Raises ConfigError: an unknown key is named with the nearest known one.
    """
    tree = merge(merge(read_preset(preset) if preset else {}, base or {}), override_tree(overrides))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item["loc"], item) for item in error.errors())) from error


def _explain(location: tuple[int | str, ...], item: Mapping[str, Any]) -> str:
    dotted = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        return f"unknown key {dotted!r}{_nearest(dotted, known_keys(Config))}"
    message = ": ".join(filter(None, (dotted, item["msg"])))
    if item["type"] == "value_error" and isinstance(item["input"], Mapping):
        return message  # a rule for several keys of a section: it names them itself
    return f"{message} (got {item['input']!r})"


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)
    return f"; did you mean {found[0]!r}?" if found else ""


def known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            keys += known_keys(nested, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys

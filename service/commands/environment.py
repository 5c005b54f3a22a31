"""Read the settings from flags and environment. The flags of ``vaeserve serve`` are the fields of Settings."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict

from service.errors import ConfigurationError
from service.settings import Settings

PREFIX = "VAESERVE_"
REMOVED = {"autotune_file": "--workers auto takes the CPUs allowed, as far as memory reaches; --workers N takes N"}
"""Settings that were removed, and what is to be used in place of each."""

T = TypeVar("T")


class GivenSettings(BaseSettings, Settings):
    """Serve bundles over HTTP. Each flag can also be given as the environment variable VAESERVE_<FLAG>."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="forbid",
        frozen=True,
        cli_prog_name="vaeserve serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )


def read_settings(flags: Sequence[str]) -> Settings:
    """Read the settings from flags, else the environment, else the defaults.

    ``--help`` and unknown flags end the process.

    Raises:
        ConfigurationError: an unknown variable, a setting that was removed, or a value out of range; the text names it.
    """
    check_environment(os.environ)
    for flag in flags:
        if flag.startswith("--"):  # else it is the value of the flag before it
            _refuse_removed(flag.partition("=")[0].removeprefix("--").replace("-", "_"), flag)
    return validated(lambda: CliApp.run(GivenSettings, cli_args=list(flags)))


def settings_with(**overrides: object) -> Settings:
    """Read the settings from the environment, but for ``overrides`` that are not None. Raises as ``read_settings``."""
    check_environment(os.environ)
    given = {name: value for name, value in overrides.items() if value is not None}
    return validated(lambda: GivenSettings(**given))  # type: ignore[arg-type]


def validated(make: Callable[[], T]) -> T:
    """Return what ``make`` returns. Raises ConfigurationError, with each faulty field, if pydantic refuses it."""
    try:
        return make()
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ConfigurationError("; ".join(faults)) from error


def check_environment(environ: Mapping[str, str]) -> None:
    """Refuse variables with our prefix that are no setting, so that a typo never leaves a default in force.

    Raises:
        ConfigurationError: names each unknown variable and the nearest setting, or what replaces a removed one.
    """
    names = {PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(name for name in environ if name.upper().startswith(PREFIX) and name.upper() not in names)
    for name in unknown:
        _refuse_removed(name.upper().removeprefix(PREFIX).lower(), name)
    if unknown:
        raise ConfigurationError("; ".join(_describe_unknown(name, names) for name in unknown))


def _refuse_removed(setting: str, written: str) -> None:
    """Raise ConfigurationError for a setting that was removed; ``written`` is the flag or the variable that sets it."""
    if setting in REMOVED:
        raise ConfigurationError(f"{written}: the setting {setting} is no more: {REMOVED[setting]}")


def _describe_unknown(name: str, names: set[str]) -> str:
    nearest = difflib.get_close_matches(name.upper(), names, n=1, cutoff=0.0)
    return f"unknown setting {name} in the environment: did you mean {nearest[0]}?"

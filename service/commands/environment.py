"""The only reader of the settings' environment. ``vaeserve serve`` derives its flags from the fields of the settings.

Apart from these, since who is handed settings need not import what reads them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import ConfigurationError
from service.settings import Settings

PREFIX = "VAESERVE_"


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


def check_environment(environ: Mapping[str, str]) -> None:
    """Refuse variables with our prefix that are no setting: a typo must not be a silent default.

    Raises:
        ConfigurationError: names each unknown variable and the nearest known one.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(name for name in environ if name.upper().startswith(PREFIX) and name.upper() not in known)
    if unknown:
        raise ConfigurationError("; ".join(_unknown(name, known) for name in unknown))


def _unknown(name: str, known: set[str]) -> str:
    nearest = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)
    return f"unknown setting {name} in the environment: did you mean {nearest[0]}?"

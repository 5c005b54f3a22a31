"""Read the settings from flags and environment. The flags of ``vaeserve serve`` are the fields of Settings."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from service.errors import ConfigurationError
from service.settings import Settings

PREFIX = "VAESERVE_"
REMOVED = {"autotune_file": "--workers auto takes the CPUs allowed, as far as memory reaches; --workers N takes N"}
"""Settings that were removed, and what is to be used in place of each."""

_OF_A_SERVICE = re.compile(
    r"VAESERVE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)", re.IGNORECASE
)
_ADDRESS_OF_A_SERVICE = re.compile(r"(tcp|udp|sctp)://\S+:\d+")

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

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *args: PydanticBaseSettingsSource, **sources: PydanticBaseSettingsSource
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take arguments and environment, but for what Kubernetes has put there."""
        given = super().settings_customise_sources(settings_cls, *args, **sources)
        for source in given:
            if isinstance(source, EnvSettingsSource):
                ignored = {name.lower() for name in variables_of_kubernetes(source.env_vars)}
                source.env_vars = {name: value for name, value in source.env_vars.items() if name not in ignored}
        return given


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


def variables_of_kubernetes(environ: Mapping[str, str | None]) -> list[str]:
    """Name the variables that Kubernetes makes of a Service whose name begins with vaeserve; none of them is a setting.

    VAESERVE_PORT=tcp://10.0.0.1:8000 is one of them, VAESERVE_PORT=8000 a setting.
    """
    return sorted(
        name
        for name, value in environ.items()
        if _OF_A_SERVICE.fullmatch(name)
        or (re.fullmatch(r"VAESERVE_(\w+_)?PORT", name, re.IGNORECASE) and _ADDRESS_OF_A_SERVICE.fullmatch(value or ""))
    )


def check_environment(environ: Mapping[str, str]) -> None:
    """Refuse variables with our prefix that are no setting, so that a typo never leaves a default in force.

    Raises:
        ConfigurationError: names each unknown variable and the nearest setting, or what replaces a removed one.
    """
    names, ignored = {PREFIX + name.upper() for name in Settings.model_fields}, set(variables_of_kubernetes(environ))
    own = (name for name in environ if name.upper().startswith(PREFIX) and name not in ignored)
    unknown = sorted(name for name in own if name.upper() not in names)
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

"""Settings of the HTTP side."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from server.errors import ConfigurationError
from server.settings import LONGEST, check, setting

ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")


@dataclass(frozen=True, kw_only=True)
class APIConfig:
    """Raises ConfigurationError, naming the field, for values out of range. Sizes are in bytes.

    model_name: what /v1/models lists and requests may ask for. Keys are sent as "Authorization: Bearer KEY"; without
    any, everyone is served. The time of a request has its waiting in it. The file of a session may always be as large
    as one is.

    root_path: what a proxy has before every path, whether or not it takes that away again.
    """

    model_name: str = "aft"
    max_body_size: int = setting(4 * 2**20, "of a request's body.", unit="MiB", positive=True)
    max_prompts: int = setting(128, "Prompts of a request.", at_least=1)
    request_timeout: float | None = setting(
        None, "Seconds after which a request fails.", positive=True, at_most=LONGEST
    )
    api_keys: tuple[str, ...] = setting(
        (), "Keys that requests must send, separated by spaces. Better in AFT_API_KEYS than here."
    )
    share_prefix_cache: bool = setting(
        False, "API keys go on from each other's cached prefixes, and can tell what another has asked by it."
    )
    cors_origins: tuple[str, ...] = setting(
        (), "Web origins whose pages may read answers, separated by spaces; * for all."
    )
    allowed_hosts: tuple[str, ...] = setting(
        (), "Names that the server answers to without keys, besides local ones, separated by spaces; * for all."
    )
    protect_metrics: bool = setting(False, "Ask for a key at /metrics, /openapi.json and /docs, too.")
    root_path: str = setting("", "Path under which a proxy has the server, /aft say.")
    ssl_certfile: Path | None = setting(None, "Certificate chain in PEM, with which the server speaks HTTPS.")
    ssl_keyfile: Path | None = setting(None, "Its key, if that is not in the same file.")
    max_connections: int | None = setting(
        None, "Connections at a time; 1,024, or half of the files that may be open, if left out.", at_least=1
    )
    max_connections_per_address: int | None = setting(
        None, "Of an IPv4 address or an IPv6 network of 64 bits; half of all if left out.", at_least=1
    )
    read_timeout: float = setting(
        20.0,
        "Seconds for a request's head, and for its body besides one for each 16 KiB.",
        positive=True,
        at_most=LONGEST,
    )
    write_timeout: float = setting(
        60.0, "Seconds after which a client that reads nothing of its answer loses it.", positive=True, at_most=LONGEST
    )
    otlp_endpoint: str | None = setting(None, "OpenTelemetry collector that gets traces, http://host:4318 say.")

    def __post_init__(self) -> None:
        check(self)
        if not all(key.isascii() and key.isprintable() and " " not in key and key for key in self.api_keys):
            raise ConfigurationError("api_keys must be of printable ASCII characters without spaces.")
        if self.root_path and not ROOT_PATH.fullmatch(self.root_path):
            raise ConfigurationError(
                f"root_path must be like /aft, without a slash at its end, not {self.root_path!r}."
            )
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ConfigurationError("ssl_keyfile needs ssl_certfile.")

"""Settings of the HTTP side."""

from __future__ import annotations

from dataclasses import dataclass

from server.errors import ConfigurationError
from server.settings import LONGEST, check, setting


@dataclass(frozen=True, kw_only=True)
class APIConfig:
    """Raises ConfigurationError, naming the field, for values out of range. Sizes are in bytes.

    model_name: what /v1/models lists and requests may ask for. Keys are sent as "Authorization: Bearer KEY"; without
    any, everyone is served. The time of a request has its waiting in it. The file of a session may always be as large
    as one is.
    """

    model_name: str = "aft"
    max_body_size: int = setting(4 * 2**20, "of a request's body.", unit="MiB", positive=True)
    max_prompts: int = setting(128, "Prompts of a request.", at_least=1)
    request_timeout: float | None = setting(
        None, "Seconds after which a request fails.", positive=True, at_most=LONGEST
    )
    write_timeout: float = setting(
        60.0, "Seconds that a client may leave a part of a stream unread.", positive=True, at_most=LONGEST
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
    otlp_endpoint: str | None = setting(None, "OpenTelemetry collector that gets traces, http://host:4318 say.")

    def __post_init__(self) -> None:
        check(self)
        if not all(key.isascii() and key.isprintable() and " " not in key and key for key in self.api_keys):
            raise ConfigurationError("api_keys must be of printable ASCII characters without spaces.")

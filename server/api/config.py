"""Settings of the HTTP side."""

from __future__ import annotations

from dataclasses import dataclass

from server.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class APIConfig:
    """Raises ConfigurationError, naming the field, for values out of range.

    model_name       what /v1/models lists and requests may ask for
    request_timeout  seconds after which a request fails, waiting included; None for never
    max_body_size    bytes of a request's body at most; the file of a session may always be as large as one is
    max_prompts      prompts of a request at most
    api_keys         what requests must send as "Authorization: Bearer KEY"; without any, everyone is served
    cors_origins     web origins whose pages may read answers; "*" for all
    otlp_endpoint    address of an OpenTelemetry collector that traces go to over HTTP; None for no traces
    """

    model_name: str = "aft"
    request_timeout: float | None = None
    max_body_size: int = 4 * 2**20
    max_prompts: int = 128
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_body_size", "max_prompts"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.request_timeout is not None and not self.request_timeout > 0:
            raise ConfigurationError(f"request_timeout must be positive, not {self.request_timeout}.")
        if not all(key.isascii() and key.isprintable() and " " not in key and key for key in self.api_keys):
            raise ConfigurationError("api_keys must be of printable ASCII characters without spaces.")

"""What `aft serve` is told."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from server import BUNDLED_MODEL
from server.api.browsers import is_local
from server.api.config import APIConfig
from server.engine import EngineConfig
from server.errors import ConfigurationError
from server.logs import LogFormat
from server.options import make, options_of
from server.sessions import SessionsConfig
from server.settings import LONGEST, check, setting


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Raises ConfigurationError, naming the field, for values out of range. It can be sent to another process.

    Sizes are in bytes. Replicas are processes that serve: at least `replicas`, at most `most_replicas`.
    """

    model: Path = setting(BUNDLED_MODEL, "Checkpoint folder.")
    host: str = setting("127.0.0.1", "Address to listen on; 0.0.0.0 for every interface.")
    port: int = setting(8000, "Port to listen on; 0 for any that is free.", at_least=0, at_most=65535)
    device: str = setting("cpu", "cpu, cuda, cuda:1, mps ...")
    threads: int | None = setting(
        None, "CPU threads of a step; if left out, one for each core that it may use.", at_least=1, at_most=1024
    )
    engine: EngineConfig = field(default_factory=EngineConfig)
    store: str | None = setting(None, "SQLite file or redis:// URL that keeps sessions; in memory if left out.")
    prefix_store: int = setting(0, "in the store for what leaves the prefix cache.", unit="MiB", at_least=0)
    sessions: SessionsConfig = field(default_factory=SessionsConfig)
    api: APIConfig = field(default_factory=APIConfig)
    drain_timeout: float = setting(
        30.0, "Seconds that running requests get after SIGTERM.", at_least=0, at_most=LONGEST
    )
    log_format: LogFormat = setting("text", "Log lines for people or for machines.")
    replicas: int = setting(1, "Replicas, with --ray.", at_least=1)
    max_replicas: int | None = setting(None, "Replicas under load, with --ray; no more than without it if left out.")

    def __post_init__(self) -> None:
        check(self)
        if self.most_replicas < self.replicas:
            raise ConfigurationError(
                f"max_replicas must be at least replicas = {self.replicas}, not {self.max_replicas}."
            )
        if self.most_replicas > 1 and self.store is None:
            raise ConfigurationError("store must be given for several replicas, which share it.")
        if self.prefix_store and self.store is None:
            raise ConfigurationError("prefix_store needs store, an SQLite file or a Redis; set it or leave both out.")
        if self.prefix_store and not self.engine.prefix_cache_bytes:
            raise ConfigurationError(
                "prefix_store keeps what leaves the prefix cache, so prefix_cache must be at least 1 MiB."
            )

    @property
    def most_replicas(self) -> int:
        return self.replicas if self.max_replicas is None else self.max_replicas


@options_of(ServerConfig)
def server_config(
    *,
    store: str | None,
    api_keys: str | None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name of the model in /v1/models and in requests; the folder's if left out.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of keys that requests must send, one in a line.")
    ] = None,
    **options: Any,
) -> ServerConfig:
    """Of the options of `aft serve`, for any working folder. Raises ConfigurationError."""
    store = store if store is None or "://" in store else str(Path(store).resolve())
    config = make(ServerConfig, {**options, "store": store})
    api = replace(
        config.api,
        model_name=served_model_name or config.model.name,
        api_keys=_api_keys(api_keys, api_key_file),
        allowed_hosts=(*config.api.allowed_hosts, *([] if is_local(config.host) else [config.host])),
    )
    return replace(config, api=api)


def _api_keys(given: str | None, path: Path | None) -> tuple[str, ...]:
    """Raises ConfigurationError where keys are asked for and there is none: an empty file must not open the server."""
    if given is None and path is None:
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"api_key_file cannot be read: {error}.") from error
    keys = (*(given or "").split(), *(line.strip() for line in lines if line.strip()))
    if not keys:
        raise ConfigurationError("api_keys and api_key_file hold no key; leave them out to serve everyone.")
    return keys

"""`aft serve`: a checkpoint over HTTP, in this process or by replicas."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from server.assemble import assemble
from server.config import ServerConfig, server_config
from server.connections import uvicorn_config
from server.draining import DrainingServer
from server.errors import ConfigurationError
from server.options import options_of


@options_of(server_config)
def serve(
    *, ray: Annotated[bool, typer.Option(help="Serve by replicas under Ray Serve.")] = False, **options: Any
) -> None:
    """Serve a checkpoint over HTTP. SIGTERM lets running requests end first."""
    config = server_config(**options)
    if ray:
        _on_ray(config)
    elif config.most_replicas > 1:
        raise ConfigurationError("replicas and max_replicas need --ray.")
    else:
        _alone(config)


def _alone(config: ServerConfig) -> None:
    """Serve in this process."""
    application = assemble(config)
    listening = uvicorn_config(
        application,
        config.api,
        host=config.host,
        port=config.port,
        timeout_graceful_shutdown=1,  # for clients that do not read; the others were waited for before
    )
    DrainingServer(listening, application.state.context.engine, config.drain_timeout).run()


def _on_ray(config: ServerConfig) -> None:
    """Raises ConfigurationError where the packages of the "ray" extra are not installed."""
    try:
        from server.deploy.replicas import run
    except ImportError as error:
        raise ConfigurationError("ray needs Ray Serve: pip install 'ray[serve]'.") from error
    run(config)

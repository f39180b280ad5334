"""`aft serve`: a checkpoint over HTTP, in this process or by replicas."""

from __future__ import annotations

import errno
import os
import socket
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
    if not ray and (options["replicas"] > 1 or (options["max_replicas"] or 1) > 1):
        raise ConfigurationError("replicas and max_replicas need --ray.")
    config = server_config(**options)
    if ray:
        _on_ray(config)
    else:
        _alone(config)


def _alone(config: ServerConfig) -> None:
    """Serve in this process."""
    check_address(config.host, config.port)
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


def check_address(host: str, port: int) -> None:
    """Before a model is loaded for nothing. Raises ConfigurationError where nobody can listen."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":  # elsewhere it would let two listen
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:  # names that are none have the latter
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ConfigurationError(f"port {port} is taken, use --port.") from error
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"Nobody can listen on host {host!r} and port {port}: {reason}.") from error

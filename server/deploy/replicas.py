"""The server as replicas under Ray Serve. Needs the "ray" extra."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.assemble import assemble, state_bytes
from server.config import ServerConfig
from server.draining import drain
from server.errors import ConfigurationError

NAME = "aft"
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
MARGIN_SECONDS = 20.0  # after a drain, for the prefix cache to be stored


@serve.ingress()
class Replica:
    """A process with an engine of its own. Ray calls these methods."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = assemble(self._config)
        self._engine = app.state.context.engine
        app.add_middleware(ReplicaHeader, replica_id=serve.get_replica_context().replica_tag)
        return app

    def check_health(self) -> None:
        """Raises if the process cannot generate; Ray then replaces it."""
        if not self._engine.is_alive:
            raise RuntimeError("The engine's thread has ended.")

    async def drain(self) -> None:
        await drain(self._engine, self._config.drain_timeout)


class ReplicaHeader:
    """Tells in each answer which replica gave it: x-replica-id."""

    def __init__(self, app: ASGIApp, replica_id: str) -> None:
        self.app, self._header = app, (b"x-replica-id", replica_id.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Ray's proxy puts x-request-id into the answer too, with the same value.
                headers = [header for header in message["headers"] if header[0] != b"x-request-id"]
                message["headers"] = [*headers, self._header]
            await send(message)

        await self.app(scope, receive, send_with_id)


def application(config: ServerConfig) -> serve.Application:
    """What Ray Serve runs. Raises ConfigurationError for devices that Ray cannot give out."""
    if config.device not in ("cpu", "cuda"):
        raise ConfigurationError(
            f"device must be cpu or cuda with --ray, which gives replicas their GPUs, not {config.device}."
        )
    # Where the checkpoint is on the machines of the replicas only, their memory is taken to be enough.
    size = state_bytes(config.model) or 1
    capacity = config.engine.capacity(size)
    options: dict[str, Any] = {
        # As many as the engine takes, so that a full replica is passed over and not asked to refuse.
        "max_ongoing_requests": capacity,
        # A burst passes through the queue of a proxy even if replicas are idle, so it has to hold one. Beyond it: 429.
        "max_queued_requests": capacity,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1.0),
        # A replica that Ray takes away gets no more requests, and this long for those it has.
        "graceful_shutdown_timeout_s": config.drain_timeout + MARGIN_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.2,
        # A dead process is noticed at once, a dead engine by the third check that fails. A check waits for the event
        # loop only, never for a step, so ten seconds without an answer are a failure too.
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 10.0,
        # Any replica can go on with any session. The same one finds more in its prefix cache.
        "request_router_config": {"request_router_class": ROUTER},
        # Ray gives an actor as many threads as CPUs.
        "ray_actor_options": {"num_cpus": config.threads or 1, "num_gpus": int(config.device == "cuda")},
        # What fails to start does so for a reason that does not pass, such as a missing file.
        "max_constructor_retry_count": 1,
        "logging_config": LoggingConfig(enable_access_log=False),  # the server writes its own
        **_number_of_replicas(config, config.engine.n_slots(size)),
    }
    deployment: serve.Deployment = serve.deployment(**options)(Replica)
    return deployment.bind(config)


def _number_of_replicas(config: ServerConfig, n_slots: int) -> dict[str, Any]:
    if config.most_replicas == config.replicas:
        return {"num_replicas": config.replicas}
    # The aim is a full batch in each replica, and nobody waiting.
    autoscaling = AutoscalingConfig(
        min_replicas=config.replicas,
        max_replicas=config.most_replicas,
        target_ongoing_requests=n_slots,
    )
    return {"autoscaling_config": autoscaling}


def run(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, on the cluster at RAY_ADDRESS or one that ends with this process.

    Raises ConfigurationError if no replica starts.
    """
    deployed = application(config)
    ray.init(include_dashboard=False)
    end = _signal_to_end()  # before there is anything to drain
    with contextlib.suppress(TimeoutError):  # Ray waits a minute for its proxy, which may come up later
        serve.start(http_options=_http_options(config))
    try:
        handle = serve.run(deployed, name=NAME)
    except RuntimeError as error:
        traceback = serve.status().applications[NAME].deployments[Replica.__name__].message
        raise ConfigurationError(f"The replicas do not start: {traceback.strip().splitlines()[-1]}") from error
    end.wait()
    handle.broadcast("drain").results()
    serve.delete(NAME)
    ray.shutdown()


def _http_options(config: ServerConfig) -> HTTPOptions:
    certificate, key = config.api.ssl_certfile, config.api.ssl_keyfile
    if certificate is None:
        return HTTPOptions(host=config.host, port=config.port)
    return HTTPOptions(
        host=config.host, port=config.port, ssl_keyfile=str(key or certificate), ssl_certfile=str(certificate)
    )


def _signal_to_end() -> threading.Event:
    """Set by SIGTERM and SIGINT; a second signal ends the process at once."""
    end = threading.Event()

    def on_signal(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        end.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return end

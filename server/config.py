"""What `aft serve` is told, and the application made of it."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from fastapi import FastAPI

from model.checkpoint import load_checkpoint
from server.api.app import create_app
from server.api.chat_template import ChatTemplate
from server.api.config import APIConfig
from server.engine import EngineConfig, LLMEngine, PrefixStore
from server.errors import ConfigurationError
from server.logs import LogFormat, configure_logging
from server.sessions import SessionsConfig
from server.stores import open_prefix_store, open_store

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of all cores in a period, and the period's
# The engine gives up the interpreter at every tensor operation, and should not wait 5 ms to have it back.
SWITCH_SECONDS = 0.0005


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Raises ConfigurationError, naming the field, for values out of range. It can be sent to another process.

    model          checkpoint folder
    threads        CPU threads of a step; None is one for each core, as far as a container's quota goes
    store          SQLite file or URL of a Redis that keeps sessions; None is in memory
    prefix_store   bytes in the store for what leaves the prefix cache; 0 keeps nothing there
    drain_timeout  seconds that running requests get at the end
    replicas       processes that serve, at least; max_replicas: at most, None for as many as replicas
    """

    model: Path
    device: str
    threads: int | None
    host: str
    port: int
    store: str | None
    prefix_store: int
    drain_timeout: float
    log_format: LogFormat
    replicas: int
    max_replicas: int | None
    api: APIConfig
    engine: EngineConfig
    sessions: SessionsConfig

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigurationError(f"replicas must be at least 1, not {self.replicas}.")
        if self.most_replicas < self.replicas:
            raise ConfigurationError(
                f"max_replicas must be at least replicas = {self.replicas}, not {self.max_replicas}."
            )
        if self.most_replicas > 1 and self.store is None:
            raise ConfigurationError("store must be given for several replicas, which share it.")

    @property
    def most_replicas(self) -> int:
        return self.replicas if self.max_replicas is None else self.max_replicas

    def build(self) -> FastAPI:
        """Make this process ready to serve, and the application that does. Raises ModelError and ConfigurationError."""
        configure_logging(self.log_format)
        network, tokenizer = load_checkpoint(self.model, self.device)
        torch.set_num_threads(self.threads or available_cores())
        sys.setswitchinterval(SWITCH_SECONDS)
        return create_app(
            LLMEngine(network, tokenizer, self.engine),
            self.api,
            ChatTemplate.load(self.model),
            open_store(self.store) if self.store else None,
            self.sessions,
            choose_prefix_store(self.store, self.prefix_store, self.engine),
        )


def available_cores() -> int:
    """A container may be allowed less than PyTorch sees."""
    try:
        quota, period = CPU_QUOTA.read_text().split()
        allowed = math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # "max", or no cgroup
        return torch.get_num_threads()
    return max(1, min(allowed, torch.get_num_threads()))


def choose_prefix_store(store: str | None, max_bytes: int, config: EngineConfig) -> PrefixStore | None:
    """Raises ConfigurationError, also for what could never be used."""
    if max_bytes < 0:
        raise ConfigurationError(f"prefix_store must be at least 0, not {max_bytes // 2**20}.")
    if not max_bytes:
        return None
    if not store:
        raise ConfigurationError("prefix_store needs store, an SQLite file or a Redis; set it or leave both out.")
    if not config.prefix_cache_bytes:
        raise ConfigurationError("prefix_store keeps what leaves the prefix cache, so prefix_cache must be at least 1.")
    return open_prefix_store(store, max_bytes)

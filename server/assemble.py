"""What a server's settings say, put together."""

from __future__ import annotations

import sys
from pathlib import Path

from fastapi import FastAPI

from model.checkpoint import CONFIG_FILE, load_checkpoint, load_config
from model.families import family_of
from server.api.app import create_app
from server.api.chat_template import ChatTemplate
from server.config import ServerConfig
from server.device import find_device
from server.engine import LLM, LLMEngine
from server.logs import configure_logging
from server.stores import open_prefix_store, open_store
from server.threads import use_threads

# The engine gives up the interpreter at every tensor operation, and should not wait 5 ms to have it back.
SWITCH_SECONDS = 0.0005


def assemble(config: ServerConfig, log_level: str = "INFO") -> FastAPI:
    """Make this process ready to serve, and the application that does. Raises ModelError and ConfigurationError."""
    device = find_device(config.device)
    configure_logging(config.log_format, log_level)
    use_threads(config.threads)
    sys.setswitchinterval(SWITCH_SECONDS)
    model, tokenizer = load_checkpoint(config.model, device)
    return create_app(
        LLMEngine(model, tokenizer, config.engine),
        config.api,
        ChatTemplate.load(config.model),
        open_store(config.store) if config.store else None,
        config.sessions,
        open_prefix_store(config.store, config.prefix_store) if config.store and config.prefix_store else None,
    )


def load_llm(config: ServerConfig) -> LLM:
    """The engine of these settings, without a server. Raises ModelError and ConfigurationError."""
    device = find_device(config.device)
    use_threads(config.threads)
    return LLM(config.model, config.engine, device=device)


def state_bytes(checkpoint: Path) -> int | None:
    """Of the state of one text, without the weights; None where there is no such checkpoint. Raises CheckpointError."""
    path = checkpoint / CONFIG_FILE
    if not path.is_file():
        return None
    config = load_config(path)
    return family_of(config).empty(config).init_state(1).nbytes

"""Generation without HTTP: a synchronous engine with continuous batching, and its asyncio front."""

from model.sampling import Grammar, SamplingParams
from server.engine.async_engine import AsyncEngine
from server.engine.config import EngineConfig
from server.engine.llm import LLM
from server.engine.llm_engine import LLMEngine
from server.engine.request import FinishReason, Request, RequestOutput, TokenOutput

__all__ = [
    "LLM",
    "AsyncEngine",
    "EngineConfig",
    "FinishReason",
    "Grammar",
    "LLMEngine",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "TokenOutput",
]

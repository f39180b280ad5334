"""Generation without HTTP: a synchronous batched engine and its asyncio front."""

from server.engine.async_engine import AsyncEngine
from server.engine.llm_engine import LLMEngine
from server.engine.request import FinishReason, Request, TokenOutput

__all__ = ["AsyncEngine", "FinishReason", "LLMEngine", "Request", "TokenOutput"]

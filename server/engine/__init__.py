"""Generation without HTTP: a synchronous engine with continuous batching, and its asyncio front."""

from model.sampling import Grammar, SamplingParams
from server.engine.admission import Admission
from server.engine.async_engine import AsyncEngine
from server.engine.completion import Completion, best
from server.engine.config import EngineConfig
from server.engine.conversation import Conversation
from server.engine.info import EngineInfo
from server.engine.llm import LLM
from server.engine.llm_engine import LLMEngine
from server.engine.prefix_store import PrefixStore, StoredPrefixes
from server.engine.request import FinishReason, PromptLogprob, Request, RequestOutput, TokenOutput, TopLogprobs
from server.engine.request_stream import RequestStream
from server.engine.snapshot import Snapshot, StateFiles

__all__ = [
    "LLM",
    "Admission",
    "AsyncEngine",
    "Completion",
    "Conversation",
    "EngineConfig",
    "EngineInfo",
    "FinishReason",
    "Grammar",
    "LLMEngine",
    "PrefixStore",
    "PromptLogprob",
    "Request",
    "RequestOutput",
    "RequestStream",
    "SamplingParams",
    "Snapshot",
    "StateFiles",
    "StoredPrefixes",
    "TokenOutput",
    "TopLogprobs",
    "best",
]

"""OpenAI's contract."""

from server.api.contracts import Contract
from server.api.openai.errors import RESPONSES, STATUSES, error_body
from server.api.openai.protocol import ChatCompletionChunk, CompletionResponse
from server.api.openai.router import router

OPENAI = Contract(
    router=router,
    prefixes=("/v1/",),
    error_body=error_body,
    statuses=STATUSES,
    responses=RESPONSES,
    events=(CompletionResponse, ChatCompletionChunk),
)

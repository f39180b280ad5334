"""text-generation-inference's contract. Paths that are of no other are told of errors in its words."""

from server.api.contracts import Contract
from server.api.tgi.errors import RESPONSES, error_body
from server.api.tgi.protocol import StreamEvent
from server.api.tgi.router import router

TGI = Contract(
    router=router, prefixes=("/",), error_body=error_body, statuses={}, responses=RESPONSES, events=(StreamEvent,)
)

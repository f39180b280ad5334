"""Errors of the server. Each message is a sentence; `server/api/errors.py` maps those of requests to statuses."""


class ServerError(Exception):
    """Base of every error that the server raises on purpose."""


class ConfigurationError(ServerError):
    """A setting of the server is out of range."""


class InvalidRequestError(ServerError):
    """The request asks for something that does not exist or cannot work here."""


class PromptTooLongError(InvalidRequestError):
    """The prompt, or it and the text that may follow, is longer than the model or this server reads.

    field: of the body, where the prompt came from, as the contract calls it.
    """

    field: str | None = None


class InvalidConversationError(InvalidRequestError):
    """What was given as a conversation is damaged, foreign, or of a newer version."""


class NotFoundError(ServerError):
    """There is no such model, session or page."""


class ModelNotFoundError(NotFoundError):
    """There is no model of that name."""


class UnauthorizedError(ServerError):
    """The request has no valid API key."""


class ForbiddenError(ServerError):
    """A page in a browser asks that has no business here."""


class UnsupportedEncodingError(ServerError):
    """The body is compressed."""


class SlowBodyError(ServerError):
    """The client did not send its body in time."""


class PayloadTooLargeError(ServerError):
    """The body has more bytes than this server reads."""


class BusySessionError(ServerError):
    """Another turn of the same session is under way."""


class QuotaError(ServerError):
    """The owner has as many sessions as are allowed."""


class StoreUnavailableError(ServerError):
    """The store of sessions does not answer; the same request may succeed later."""


class StoreFullError(StoreUnavailableError):
    """The store has no room for what was to be kept."""


class OverloadedError(ServerError):
    """The queue is full; the same request may succeed later."""


class RequestTimeoutError(ServerError):
    """The request was not done by its deadline."""


class GenerationError(ServerError):
    """Generation failed after the request was accepted."""


class SlowReaderError(ServerError):
    """The client did not read its stream for so long that the text was dropped."""


class EngineDeadError(ServerError):
    """The engine has failed; nothing can be generated until the process is restarted."""


class ShuttingDownError(ServerError):
    """The server takes no new requests."""

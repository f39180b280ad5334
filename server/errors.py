"""Errors of the server. Each message is a sentence for the client; `server/api/errors.py` maps them to statuses."""


class ServerError(Exception):
    """Base of every error that a request can end with."""


class InvalidRequestError(ServerError):
    """The request asks for something that does not exist or cannot work here."""


class OverloadedError(ServerError):
    """The queue is full; the same request may succeed later."""


class GenerationError(ServerError):
    """Generation failed after the request was accepted."""


class ShuttingDownError(ServerError):
    """The server takes no new requests."""

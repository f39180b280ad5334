"""Errors of the server. Each message is a sentence; `server/api/errors.py` maps those of requests to statuses."""


class ServerError(Exception):
    """Base of every error that the server raises on purpose."""


class ConfigurationError(ServerError):
    """A setting of the server is out of range."""


class InvalidRequestError(ServerError):
    """The request asks for something that does not exist or cannot work here."""


class OverloadedError(ServerError):
    """The queue is full; the same request may succeed later."""


class RequestTimeoutError(ServerError):
    """The request was not done by its deadline."""


class GenerationError(ServerError):
    """Generation failed after the request was accepted."""


class ShuttingDownError(ServerError):
    """The server takes no new requests."""

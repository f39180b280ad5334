"""Errors raised by the model package. Each message is a sentence that names the offending value."""


class ModelError(Exception):
    """Base of every error that `model` raises on purpose."""


class ConfigError(ModelError, ValueError):
    """A configuration field is unknown, missing or out of range."""


class CheckpointError(ModelError):
    """A checkpoint folder is incomplete, damaged, or does not match its own configuration."""


class ContextLengthError(ModelError, ValueError):
    """A sequence would run past `max_positions`, where the model has no position parameters."""


class TokenizationError(ModelError, ValueError):
    """Text or token ids that the tokenizer cannot represent."""


class TrainingError(ModelError):
    """A training run cannot go on."""

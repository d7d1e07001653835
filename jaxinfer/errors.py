"""Errors a user can act on: each message is one line; the command line exits with code 2."""


class JaxinferError(Exception):
    """Base of every error this library raises on purpose."""


class InvalidArgument(JaxinferError, ValueError):
    """An argument, flag or sampling parameter is out of range or contradicts another."""


class ModelNotFound(JaxinferError, LookupError):
    """The name given to `load` is no alias, hub repository, file or folder that can be had."""


class UnsupportedModel(JaxinferError):
    """The checkpoint asks for an architecture, or maths, that this library does not implement."""


class CorruptFile(JaxinferError):
    """A checkpoint, tokenizer or template is malformed; names the file, the field and the fault."""


class PromptTooLong(InvalidArgument):
    """The prompt and the tokens asked for do not fit the context."""


class OutOfMemory(JaxinferError, MemoryError):
    """The model or its cache does not fit; names the bytes needed and the bytes available."""

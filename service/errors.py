"""Exceptions of the service, without HTTP statuses: service/api/app.py holds the one table from errors to statuses.

VaeserveError
├── BundleError                 a bundle on disk cannot be trusted or used
│   ├── BundleNotFound          nothing under that path
│   ├── BundleFormatError       manifest unreadable, unknown format_version, schema violated
│   ├── BundleIntegrityError    a file is missing, extra, or differs from its sha256 or size
│   ├── BundleGraphError        a graph has foreign operators, external data, or another signature
│   └── BundleParityError       replaying reference.npz leaves the declared tolerance
├── DeviceUnavailable           the requested execution provider is not available
├── ConfigurationError          a setting is unknown or out of range
├── ModelNotFound               no model (or version) of that name is served
├── UnsupportedVerb             this model cannot answer that verb (with the reason)
├── InvalidInput                the caller's data cannot be used; says what was expected
│   ├── UnsupportedMediaType    a Content-Type that this route does not read
│   ├── NotAcceptable           an Accept header that this route cannot answer
│   └── LimitExceeded           a limit of the settings was exceeded; says which, by what
│       └── PayloadTooLarge     bytes or pixels of the body, encoded or decoded
├── Overloaded                  the queue is full; carries retry_after seconds
├── DeadlineExceeded            the answer was not ready in time
└── ClientDisconnected          the client closed the connection before the answer
"""


class VaeserveError(Exception):
    """Base of every error that vaeserve raises on purpose; its text may be shown to the client."""


class BundleError(VaeserveError):
    """A bundle on disk cannot be trusted or used."""


class BundleNotFound(BundleError):
    """There is no bundle at the given path."""


class BundleFormatError(BundleError):
    """The manifest is unreadable, of an unknown format_version, or violates the schema."""


class BundleIntegrityError(BundleError):
    """A file is missing, is not listed, or differs from its recorded sha256 or size."""


class BundleGraphError(BundleError):
    """A graph holds operators outside the allow-list, external data, or another signature than the manifest's."""


class BundleParityError(BundleError):
    """Replaying the reference tensors leaves the declared tolerance."""


class DeviceUnavailable(VaeserveError):
    """The requested execution provider is not available; another one is never used instead."""


class ConfigurationError(VaeserveError):
    """A setting is unknown or out of range."""


class ModelNotFound(VaeserveError):
    """No model, or no such version of it, is served under the given name."""


class UnsupportedVerb(VaeserveError):
    """The model cannot answer a verb; the text gives the reason."""


class InvalidInput(VaeserveError):
    """The caller's data cannot be used; the text says which row or field and what was expected."""


class UnsupportedMediaType(InvalidInput):
    """The Content-Type is none that the route reads."""


class NotAcceptable(InvalidInput):
    """The Accept header names no media type that the route can answer with."""


class LimitExceeded(InvalidInput):
    """A limit of the settings was exceeded; the text names it, what the request asks for, and what is allowed."""


class PayloadTooLarge(LimitExceeded):
    """The body, as sent or after decoding, holds more bytes, pixels or numbers than allowed."""


class Overloaded(VaeserveError):
    """The queue is full. ``retry_after`` is the number of seconds after which a retry makes sense."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(VaeserveError):
    """The answer was not ready within the allowed time."""


class ClientDisconnected(VaeserveError):
    """The client closed the connection; work that had not begun is dropped."""


def forget_frames(error: BaseException | None) -> None:
    """Drop the tracebacks of an error and of the errors that caused it, if only its text is needed any more.

    A failed future, its exception, the traceback, and the frame that waits for the future form a reference cycle, which
    would keep the request's body and arrays in memory until the next garbage collection.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__

"""Domain exceptions of the service. No HTTP numbers here: app.py holds the one table error -> status.

VaeserveError
├── BundleError                 a bundle on disk cannot be trusted or used
│   ├── BundleNotFound          nothing under that path
│   ├── BundleFormatError       manifest unreadable, unknown format_version, schema violated
│   ├── BundleIntegrityError    a file is missing, extra, or differs from its sha256 or size
│   ├── BundleGraphError        a graph has foreign operators, external data, or another signature
│   └── BundleParityError       replaying reference.npz leaves the declared tolerance
├── DeviceUnavailable           the asked execution provider is not there
├── ConfigurationError          a setting is unknown or out of range
├── ModelNotFound               no model (or version) of that name is served
├── UnsupportedVerb             this model cannot answer that verb (with the reason)
├── InvalidInput                the caller's data: says what was expected
│   ├── UnsupportedMediaType    a Content-Type this route does not read
│   ├── NotAcceptable           an Accept this route cannot answer
│   └── LimitExceeded           a limit of the settings: which, asked, allowed
│       └── PayloadTooLarge     bytes of the body, decoded or not
├── Overloaded                  the queue is full; carries retry_after seconds
├── DeadlineExceeded            the answer was not ready in time
└── ClientDisconnected          the caller hung up; nobody reads the answer
"""


class VaeserveError(Exception):
    """Root of every error that vaeserve raises on purpose. ``str(error)`` is fit for the caller's eyes."""


class BundleError(VaeserveError):
    """A bundle on disk cannot be trusted or used."""


class BundleNotFound(BundleError):
    """Nothing that looks like a bundle stands at that path."""


class BundleFormatError(BundleError):
    """The manifest is unreadable, of an unknown format_version, or violates the schema."""


class BundleIntegrityError(BundleError):
    """A file is missing, is not listed, or differs from its recorded sha256 or size."""


class BundleGraphError(BundleError):
    """A graph holds operators outside the allow-list, external data, or another signature than the manifest's."""


class BundleParityError(BundleError):
    """Replaying the reference tensors leaves the declared tolerance."""


class DeviceUnavailable(VaeserveError):
    """The asked execution provider is not there; never replaced by another in silence."""


class ConfigurationError(VaeserveError):
    """A setting is unknown or out of range."""


class ModelNotFound(VaeserveError):
    """No model, or no such version of it, is served under that name."""


class UnsupportedVerb(VaeserveError):
    """This model cannot answer that verb; the text gives the reason."""


class InvalidInput(VaeserveError):
    """The caller's data cannot be used; the text says which row or field and what was expected."""


class UnsupportedMediaType(InvalidInput):
    """The Content-Type is none that this route reads."""


class NotAcceptable(InvalidInput):
    """The Accept header names nothing that this route can answer with."""


class LimitExceeded(InvalidInput):
    """A limit of the settings was passed; the text names it, what was asked, and what is allowed."""


class PayloadTooLarge(LimitExceeded):
    """The body, as sent or once decoded, holds more bytes or pixels than allowed."""


class Overloaded(VaeserveError):
    """The queue is full. ``retry_after`` is the number of seconds after which a retry makes sense."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(VaeserveError):
    """The answer was not ready within the allowed time."""


class ClientDisconnected(VaeserveError):
    """The caller closed the connection; work that had not begun is dropped."""


def forget_frames(error: BaseException | None) -> None:
    """Drop the tracebacks of an error that is told in words, and of what led to it.

    A future that has failed, its exception, the traceback, a frame that waits for the future: a circle, which would
    keep the request's body and arrays until the next garbage collection.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__

"""Errors of the training package. ``str(error)`` is fit for the user's eyes and says what was expected.

TrainingError
├── ConfigError           a key or value of the configuration is not valid
├── CheckpointError       a checkpoint is unreadable or belongs to another configuration
├── TrainingDiverged      gradients are no longer sane
├── ModelDiverged         a trained model is worse than a constant
├── ExportError           a model cannot become a bundle
├── BackboneError         a user's ONNX feature extractor cannot stand before a model
└── DataError             the training data cannot be had or used
    ├── DataNotFound      nothing at that path, or no data set of that name
    ├── DownloadError     no mirror gave the archive; lists what was tried
    ├── DataFormatError   a file's bytes are not what its format promises
    ├── BadImages         images were refused (on_bad = "refuse"); names them
    └── SplitError        too few images for the asked splits
"""


class TrainingError(Exception):
    """Root of every error that the training package raises on purpose."""


class ConfigError(TrainingError):
    """A key is unknown or a value out of range; the text names the nearest known key."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be read, or was made with another configuration; the text names the keys."""


class TrainingDiverged(TrainingError):
    """Too many updates in a row had to be skipped."""


class ModelDiverged(TrainingError):
    """A trained model is worse than the best constant of its likelihood; the text gives both numbers."""


class ExportError(TrainingError):
    """A model cannot become a bundle; the text says at which step."""


class BackboneError(TrainingError):
    """A user's ONNX feature extractor cannot stand before a model; the text says what was expected of it."""


class DataError(TrainingError):
    """The training data cannot be had or used."""


class DataNotFound(DataError):
    """Nothing stands at that path, and no data set has that name."""


class DownloadError(DataError):
    """No mirror gave the archive; the text lists what was tried and what came of it."""


class DataFormatError(DataError):
    """A file's bytes are not what its format promises."""


class BadImages(DataError):
    """Images that cannot be used, where the configuration says to refuse rather than to skip them."""


class SplitError(DataError):
    """Too few images for the asked splits; the text gives the numbers."""

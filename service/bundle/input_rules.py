"""Input rules: how images become pixels, how vectors and signals become rows of numbers, and a backbone's features."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Size = Annotated[int, Field(ge=1, le=2**20)]
FeatureName = Annotated[str, Field(max_length=128, pattern=r"^\S(.*\S)?$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StrictModel(BaseModel):
    """Base of the manifest's parts: unknown keys are refused, values are immutable, numbers finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Tiling(StrictModel):
    """Rule by which a model of tiles scores an image of any size; service.inference.tiled computes it.

    An image is never resized. Tiles of preprocessing's height×width lie ``stride`` pixels apart, down and across, from
    the upper left corner on, and one more at the edge where the last would not reach it: together they cover the
    image. Each is a row. ``aggregate`` makes the tiles' scores the image's:

    ``maximum``: −log(−m log(1 − p)), nats, p the tail probability, among held-out tiles, of the tile that scores
    highest, and m how many tiles fit into the image's area: larger images hold more tiles, and their highest score is
    higher by chance alone (Šidák 1967: of m independent tiles one is as extreme with probability 1 − (1 − p)^m, which
    falls as this score rises). The tails are in tiles.npz. ``top``: mean of the ``share`` of the tiles that score
    highest, of one at least.
    """

    stride: tuple[int, int] = Field(description="pixels between neighbouring tiles: down, across")
    aggregate: Literal["maximum", "top"] = "maximum"
    share: float = Field(default=0.05, gt=0, le=1, description="of the tiles that ``top`` looks at; 1: of all")


class Preprocessing(StrictModel):
    """Rule by which any image becomes C×H×W pixels; service.formats.images applies it in training and in serving.

    EXIF orientation is applied, alpha is composited on ``background``, the colour mode is converted, and the image is
    brought to ``height``×``width``: ``cover`` scales the shorter side to fit and crops the centre, ``contain`` scales
    the longer side to fit and pads with ``background``, ``stretch`` ignores the aspect ratio. An image that already
    has the target size is not resampled. With ``tiling`` no image is resized: a row is a tile of it.
    """

    kind: Literal["image"] = "image"
    mode: Literal["L", "RGB"]
    height: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=4096)
    fit: Literal["cover", "contain", "stretch"] = "cover"
    resample: Literal["bilinear", "bicubic", "lanczos", "box"] = "bilinear"
    background: int = Field(default=0, ge=0, le=255)
    tiling: Tiling | None = Field(default=None, description="of a model of tiles of larger images")

    @model_validator(mode="after")
    def _tiles_cover(self) -> Preprocessing:
        if self.tiling is None:
            return self
        for stride, side in zip(self.tiling.stride, (self.height, self.width), strict=True):
            if not 1 <= stride <= side:
                raise ValueError(f"tiling.stride {stride} of tiles of {side} pixels: expected 1 to {side}")
        return self

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return 1 if self.mode == "L" else 3

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) inside the graphs."""
        return (self.channels, self.height, self.width)

    @property
    def natural(self) -> tuple[int, ...]:
        """Shape of one image outside the graphs: (C, H, W)."""
        return self.shape


class ArrayPreprocessing(StrictModel):
    """Rows of numbers in their own units: any finite float32, never scaled nor resized outside the graphs.

    ``natural`` is the shape that the outside sees: (D,) of a vector of D features, (C, T) of a signal of C channels and
    T steps. ``features`` names a vector's numbers in order; a name never reads as a number, so that a table's header
    cannot be taken for a row.
    """

    kind: Literal["vector", "signal"]
    natural: tuple[Size, ...] = Field(min_length=1, max_length=2, description="(D,) of a vector, (C, T) of a signal")
    features: list[FeatureName] | None = Field(default=None, description="D names, of a vector only")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Inside the graphs: (1, 1, D) of a vector, (C, 1, T) of a signal."""
        return (1, 1, self.natural[0]) if self.kind == "vector" else (self.natural[0], 1, self.natural[1])

    @model_validator(mode="after")
    def _consistent(self) -> ArrayPreprocessing:
        if len(self.natural) != {"vector": 1, "signal": 2}[self.kind]:
            raise ValueError(f"natural is {self.natural}, expected (D,) for a vector, (C, T) for a signal")
        if self.features is None:
            return self
        if self.kind != "vector" or len(self.features) != self.natural[0]:
            raise ValueError(f"{len(self.features)} features of a {self.kind} of shape {self.natural}")
        if len(set(self.features)) != len(self.features):
            raise ValueError("features hold the same name twice")
        numbers = [name for name in self.features if reads_as_number(name)]
        if numbers:
            raise ValueError(f"features hold {numbers[0]!r}, which reads as a number: give it a name")
        return self


def _kind(value: object) -> str:
    """Tag of the rule that a document or an object states: an image's where ``kind`` is missing, as in format 1."""
    kind = value.get("kind", "image") if isinstance(value, dict) else getattr(value, "kind", "image")
    return "image" if kind == "image" else "array"


InputRule = Annotated[
    Annotated[Preprocessing, Tag("image")] | Annotated[ArrayPreprocessing, Tag("array")], Discriminator(_kind)
]
"""The rule that states what a row of a model is: a manifest's ``preprocessing``."""


class Backbone(StrictModel):
    """A frozen network that stands before the model: images go in, and all that the other graphs see are its features.

    ``natural``: (F,) of features pooled over the image, (F, h, w) of a map. ``batch``: whether backbone.onnx takes any
    number of rows, or one at a time. ``output`` and ``sha256`` tell which tensor of which file it was made from, and
    ``mean`` and ``std``, by channel, what x was normalised with, (x − mean)/std; all of it stands in the graph.
    """

    kind: Literal["vector", "map"]
    natural: tuple[Size, ...] = Field(min_length=1, max_length=3)
    batch: Literal["any", "one"] = "any"
    output: str = Field(default="", max_length=1024)
    sha256: Sha256 | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Inside the other graphs: (1, 1, F) of pooled features, (F, h, w) of a map."""
        return (1, 1, self.natural[0]) if self.kind == "vector" else (self.natural[0], self.natural[1], self.natural[2])

    @model_validator(mode="after")
    def _consistent(self) -> Backbone:
        if len(self.natural) != {"vector": 1, "map": 3}[self.kind]:
            raise ValueError(f"natural is {self.natural}, expected (F,) for a vector, (F, h, w) for a map")
        return self


def reads_as_number(text: str) -> bool:
    """True if Python's float() reads the text: such a name cannot stand in a table's header."""
    try:
        float(text)
    except ValueError:
        return False
    return True

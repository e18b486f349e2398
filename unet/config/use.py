"""What is done with a trained model."""

from typing import Literal

from pydantic import Field

from unet.config.base import Part
from unet.config.places import DoorSettings, StoreSettings


class EvaluatePart(Part):
    """What is scored on what."""

    model: str = ""
    """A run's name (its best checkpoint), or a checkpoint's folder."""
    data: str = "synthetic"
    """As for training."""
    split: Literal["train", "val", "test"] = "test"
    """Which samples."""
    output: str | None = None
    """Also write metrics.json into this folder."""


class EvaluateSettings(Part):
    """Score a trained model."""

    evaluate: EvaluatePart = EvaluatePart()
    store: StoreSettings = Field(default_factory=StoreSettings)
    door: DoorSettings = DoorSettings()

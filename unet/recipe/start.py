"""What a network begins with."""

from pydantic import model_validator

from unet.settings import SettingsGroup


class StartSettings(SettingsGroup):
    """What the network knows before it trains."""

    init_from: str | None = None
    """Begin with the weights of an earlier model (a run's name, a checkpoint's folder or an MLflow URI) whose names and
    shapes fit; the last layer learns anew where the classes are others. None: with weights that are drawn."""
    encoder_weights: str | None = None
    """File of weights for --encoder. None: those of ImageNet."""

    @model_validator(mode="after")
    def _has_one_source(self):
        if self.init_from and self.encoder_weights:
            raise ValueError("--init-from brings the encoder's weights: leave out --encoder-weights")
        return self

"""`SSLConfig`: a backbone's configuration and what the method adds to it."""

from __future__ import annotations

from transformers import AutoConfig, PreTrainedConfig, ResNetConfig

from matrix_llm.base.errors import RecipeError
from matrix_llm.ssl.methods import check_loss_settings, find_method
from matrix_llm.ssl.models import small_resnet  # noqa: F401  (registers the type that a recipe may name)

__all__ = ["SSLConfig"]


class SSLConfig(PreTrainedConfig):
    """Configuration of an `SSLModel`. A width that is None takes the paper's value, from `methods.METHODS`.

    Raises:
        RecipeError: settings that contradict each other or the method.
    """

    model_type = "matrix_ssl"
    sub_configs = {"backbone_config": AutoConfig}  # type: ignore[dict-item]  # noqa: RUF012

    method: str = "matrix_ssl"
    """A key of METHODS."""
    backbone_config: dict | PreTrainedConfig | None = None
    """Any architecture that `AutoModel` builds, with its `model_type`; None is a ResNet-50."""
    projector_widths: list[int] | None = None
    """Widths of the projector's layers, each above 0; the last is d."""
    predictor_widths: list[int] | None = None
    """Widths of the predictor's layers, for a method that has one; the last must be d."""
    loss_settings: dict | None = None
    """Keyword arguments of the method's loss, e.g. {"gamma": 1.0}."""
    queue_size: int | None = None
    """Keys in MoCo's queue, at least one batch; 0 or None for the other methods."""
    prototypes: int | None = None
    """SwAV's prototypes, above 0; 0 or None for the other methods."""
    zero_init_residual: bool = True
    """Start each residual branch at zero (Goyal et al. 2017), which `transformers` does not do."""
    probe_classes: int = 0
    """Classes of the online linear probe; 0 for no probe."""

    def __post_init__(self, **kwargs):
        method = find_method(self.method)
        self.backbone_config = _backbone_config(self.backbone_config)
        self.projector_widths = list(self.projector_widths or method.projector)
        # 1. The loss
        self.loss_settings = dict(self.loss_settings or {})
        check_loss_settings(self.method, self.loss_settings)
        # 2. The predictor
        if method.predictor is None:
            if self.predictor_widths:
                raise RecipeError(
                    f"predictor_widths={self.predictor_widths}, but {self.method} has no predictor. Remove it."
                )
        elif not self.predictor_widths:
            self.predictor_widths = [*method.predictor[:-1], self.projector_widths[-1]]
        elif self.predictor_widths[-1] != self.projector_widths[-1]:
            raise RecipeError(
                f"predictor_widths={self.predictor_widths} must end at the last width of projector_widths="
                f"{self.projector_widths}, because predictions are compared with projections. Give both the same last "
                "width."
            )
        # 3. MoCo's queue and SwAV's prototypes
        for name, default in (("queue_size", method.queue), ("prototypes", method.prototypes)):
            value = getattr(self, name)
            if value is None:
                setattr(self, name, default)
            elif bool(value) != bool(default):
                needs = "needs a positive number" if default else "has none"
                raise RecipeError(f"{name}={value}, but {self.method} {needs}. Correct it, or remove it.")
        super().__post_init__(**kwargs)


def _backbone_config(given: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    if given is None:
        return ResNetConfig()
    if not isinstance(given, dict):
        return given
    try:
        return AutoConfig.for_model(**given)
    except (ValueError, KeyError, TypeError) as error:  # what transformers raises for an unknown type or a wrong value
        raise RecipeError(f"backbone_config: {str(error)[:300]}") from None

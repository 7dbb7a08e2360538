"""`SSLModel`: a backbone with the heads of one method, as a `transformers` model; and a ResNet for small images.

The backbone is any model that `transformers.AutoModel` builds from a configuration. What a run leaves in its root is that backbone
alone, so that `AutoModel.from_pretrained(run)` needs nothing from here, except for a `small_resnet` (`import matrix_llm.ssl.modeling`).

Legend: B images of this rank, C channels, S pixels a side, F features of the backbone, d width of the last head.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, ResNetConfig, ResNetModel
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer, ResNetConvLayer
from transformers.utils import ModelOutput

from matrix_llm.ssl.gather import gather_rows
from matrix_llm.ssl.methods import Branches, Method, check_loss_settings, method_named

__all__ = [
    "SSLConfig",
    "SSLModel",
    "SmallResNetConfig",
    "SmallResNetModel",
    "SyncBatchNorm",
    "feature_dim",
    "load_backbone",
    "pooled",
    "synchronise_batch_norm",
]


# ------------------------------------------------------------------------------------------------------------ small images


class SmallResNetConfig(ResNetConfig):
    """`ResNetConfig` with a stem for images of about 32 pixels: one 3 x 3 convolution of stride 1, no pooling (CIFAR's usual change)."""

    model_type = "small_resnet"


class SmallResNetModel(ResNetModel):
    """
    >>> config = SmallResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    >>> SmallResNetModel(config)(torch.zeros(2, 3, 16, 16)).last_hidden_state.shape
    torch.Size([2, 16, 8, 8])
    """

    config_class = SmallResNetConfig

    def __init__(self, config: SmallResNetConfig) -> None:
        super().__init__(config)
        self.embedder.embedder = ResNetConvLayer(
            config.num_channels, config.embedding_size, kernel_size=3, stride=1, activation=config.hidden_act
        )
        self.embedder.add_module("pooler", nn.Identity())  # in place of the 3 x 3 maximum
        self.post_init()


AutoConfig.register("small_resnet", SmallResNetConfig)
AutoModel.register(SmallResNetConfig, SmallResNetModel)


def pooled(
    backbone: PreTrainedModel,
    pixel_values: Tensor,  # (B, C, S, S)
) -> Tensor:
    """(B, F): the model's own pooled output where it has one, else the mean over positions."""
    output = backbone(pixel_values)
    features = getattr(output, "pooler_output", None)
    if features is not None:
        return features.flatten(1)
    hidden = output.last_hidden_state
    return hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))


def feature_dim(backbone: PreTrainedModel) -> int:
    """F, from the configuration."""
    sizes = getattr(backbone.config, "hidden_sizes", None)
    return int(sizes[-1] if sizes else backbone.config.hidden_size)


# --------------------------------------------------------------------------------------------- batch normalisation over ranks


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the rows of all ranks, in plain collectives: PyTorch's own has no CPU version."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (B, C, ...), not {tuple(input.shape)}.")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        axes = [0, *range(2, input.ndim)]
        shape = [1, -1] + [1] * (input.ndim - 2)
        given, input = input.dtype, input.float()  # under autocast rows may be bfloat16
        mean = _mean_over_ranks(input.mean(axes))
        centred = input - mean.view(shape)
        variance = _mean_over_ranks(centred.square().mean(axes))
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                rows = input.numel() // input.shape[1] * (dist.get_world_size() if dist.is_initialized() else 1)
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * (rows / max(rows - 1, 1)), momentum)
        out = centred * (variance + self.eps).rsqrt().view(shape)
        return (out if self.weight is None else out * self.weight.view(shape) + self.bias.view(shape)).to(given)


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> None:
    """Turns the batch normalisations inside `module` into those over all ranks, in place; names and state stay."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            if device.type == "cpu":
                child.__class__ = SyncBatchNorm
            else:
                setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
        else:
            synchronise_batch_norm(child, device)


def _mean_over_ranks(x: Tensor) -> Tensor:
    """With gradients; the ranks hold equally many rows, which `gather_rows` checks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(x) / dist.get_world_size()


# ------------------------------------------------------------------------------------------------------------------- heads


def mlp(widths: tuple[int, ...], *, hidden_bn: bool = True, end: str = "linear") -> nn.Sequential:
    """Linear layers of these widths, with batch normalisation and ReLU between them.

    >>> [type(layer).__name__ for layer in mlp((4, 8, 2), end="bn")]
    ['Linear', 'BatchNorm1d', 'ReLU', 'Linear', 'BatchNorm1d']
    """
    layers: list[nn.Module] = []
    for i, (inner, outer) in enumerate(itertools.pairwise(widths)):
        is_last = i == len(widths) - 2
        followed = end != "linear" if is_last else hidden_bn
        layers.append(nn.Linear(inner, outer, bias=not followed))
        if followed:
            layers.append(nn.BatchNorm1d(outer, affine=not (is_last and end == "bn")))
        if not is_last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class SSLConfig(PreTrainedConfig):
    """A backbone's configuration and what the method puts on it. Widths that are None are the paper's (`methods.METHODS`).

    Args:
        method: a key of METHODS.
        backbone_config: of any architecture that `AutoModel` builds, with its `model_type`.
        projector_widths, predictor_widths: of the heads' layers, the last being d. A predictor ends at the projector's width.
        loss_settings: keyword arguments of the method's loss, e.g. {"gamma": 1.0}.
        queue_size: MoCo's keys. prototypes: SwAV's.
        zero_init_residual: start each residual branch at zero (Goyal et al. 2017), which `transformers` does not do.
        probe_classes: classes of the online linear probe; 0 for none.
    """

    model_type = "matrix_ssl"
    sub_configs = {"backbone_config": AutoConfig}  # type: ignore[dict-item]  # noqa: RUF012

    method: str = "matrix_ssl"
    backbone_config: dict | PreTrainedConfig | None = None
    projector_widths: list[int] | None = None
    predictor_widths: list[int] | None = None
    loss_settings: dict | None = None
    queue_size: int | None = None
    prototypes: int | None = None
    zero_init_residual: bool = True
    probe_classes: int = 0

    def __post_init__(self, **kwargs):
        method = method_named(self.method)
        backbone = self.backbone_config
        if backbone is None:
            backbone = ResNetConfig()
        if isinstance(backbone, dict):
            backbone = AutoConfig.for_model(**backbone)
        self.backbone_config = backbone
        self.projector_widths = list(self.projector_widths or method.projector)
        self.loss_settings = dict(self.loss_settings or {})
        check_loss_settings(self.method, self.loss_settings)
        if method.predictor is None:
            if self.predictor_widths:
                raise ValueError(
                    f"predictor_widths={self.predictor_widths}, but {self.method} has no predictor. Remove it."
                )
        elif not self.predictor_widths:
            self.predictor_widths = [*method.predictor[:-1], self.projector_widths[-1]]
        elif self.predictor_widths[-1] != self.projector_widths[-1]:
            raise ValueError(
                f"predictor_widths={self.predictor_widths} ends at another width than projector_widths={self.projector_widths}, but "
                "predictions are compared with projections. Give them the same last width."
            )
        for name, wanted in (("queue_size", method.queue), ("prototypes", method.prototypes)):
            value = getattr(self, name)
            if value is None:
                setattr(self, name, wanted)
            elif bool(value) != bool(wanted):
                raise ValueError(
                    f"{name}={value}, but {self.method} {'needs one' if wanted else 'has none'}. Correct it, or leave it out."
                )
        super().__post_init__(**kwargs)


@dataclass
class SSLOutput(ModelOutput):
    """Of a pair of views; of one view, `features` and `embedding` alone."""

    loss: Tensor | None = None  # () the method's loss alone, over the rows of all ranks
    probe_loss: Tensor | None = None  # () cross-entropy of the online probe, over this rank's rows
    probe_correct: Tensor | None = None  # () share of this rank's rows
    features: Tensor | None = None  # (B, F) of the first view
    embedding: Tensor | None = None  # (B, d) what the loss sees of it


class SSLModel(PreTrainedModel):
    """Backbone, projector, predictor, target network, queue, prototypes and online probe: what the method has of them.

    >>> backbone = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    >>> model = SSLModel(SSLConfig(method="simsiam", backbone_config=backbone, projector_widths=[16, 16], predictor_widths=[4, 16]))
    >>> bool(model(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)).loss.isfinite())
    True
    """

    config_class = SSLConfig
    base_model_prefix = "ssl"
    main_input_name = "pixel_values"

    backbone: PreTrainedModel
    predictor: nn.Sequential | None
    prototypes: nn.Parameter
    queue: Tensor
    queue_end: Tensor
    probe: nn.Sequential | None
    target_backbone: PreTrainedModel | None
    target_projector: nn.Sequential | None

    def __init__(self, config: SSLConfig) -> None:
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config)
        method, width = self.method, feature_dim(self.backbone)
        assert config.projector_widths is not None
        self.projector = mlp((width, *config.projector_widths), hidden_bn=method.hidden_bn, end=method.projector_end)
        self.predictor = (
            mlp((config.projector_widths[-1], *config.predictor_widths)) if config.predictor_widths else None
        )
        if config.prototypes:
            self.prototypes = nn.Parameter(torch.randn(config.prototypes, config.projector_widths[-1]))
        if config.queue_size:
            self.register_buffer(
                "queue", F.normalize(torch.randn(config.queue_size, config.projector_widths[-1]), dim=1)
            )
            self.register_buffer("queue_end", torch.zeros((), dtype=torch.long))
        self.probe = None
        if config.probe_classes:  # normalised features, so that one learning rate suits every method
            self.probe = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, config.probe_classes))
        self.target_backbone = copy.deepcopy(self.backbone) if method.target else None
        self.target_projector = copy.deepcopy(self.projector) if method.target else None
        self.post_init()
        if config.zero_init_residual:
            zero_init_residual(self.backbone)
        self.update_target(0.0)
        for part in (self.target_backbone, self.target_projector):
            if part is not None:
                part.requires_grad_(False)

    @property
    def method(self) -> Method:
        return method_named(self.config.method)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the heads keep PyTorch's own initialisation, as in every released code; a backbone has its own."""

    def heads(self) -> list[nn.Module]:
        """Everything that is trained beside the backbone, without the probe."""
        return [part for part in (self.projector, self.predictor) if part is not None]

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """target <- momentum * target + (1 - momentum) * online, over parameters; running statistics are the target's own."""
        for online, target in ((self.backbone, self.target_backbone), (self.projector, self.target_projector)):
            if target is None:
                continue
            pairs = zip(online.parameters(), target.parameters(), strict=True)
            for new, old in pairs:
                if momentum == 0:
                    old.copy_(new)
                else:
                    old.lerp_(new, 1 - momentum)

    @torch.no_grad()
    def _target(self, pixel_values: Tensor) -> Tensor:
        assert self.target_backbone is not None
        assert self.target_projector is not None
        return self.target_projector(pooled(self.target_backbone, pixel_values))

    def _online(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        features = pooled(self.backbone, pixel_values)
        z = self.projector(features)
        return features, z, None if self.predictor is None else self.predictor(z)

    def forward(
        self,
        pixel_values: Tensor,  # (B, C, S, S)
        pixel_values2: Tensor | None = None,  # (B, C, S, S) another view of the same images
        labels: Tensor | None = None,  # (B,) for the online probe
        epoch: float | None = None,  # for the methods whose loss has a schedule; None: its end
    ) -> SSLOutput:
        """
        Views are separate passes, so that batch normalisation sees one kind of view at a time, as in the released codes.

        Raises:
            ValueError: labels outside the probe's classes; rows that the loss cannot take (see its own errors).
        """
        features, z1, p1 = self._online(pixel_values)
        embedding = z1 if p1 is None else p1
        if pixel_values2 is None:
            return SSLOutput(features=features, embedding=embedding)
        one_sided = self.method.one_sided
        targets: list[Tensor | None] = [None, None]
        _, z2, p2 = (None, None, None) if one_sided else self._online(pixel_values2)
        if self.target_backbone is not None:
            targets = [None if one_sided else self._target(pixel_values), self._target(pixel_values2)]
        present = [x for x in (z1, z2, p1, p2, *targets) if x is not None]
        gathered = iter(gather_rows(*present))
        rows = [None if x is None else next(gathered) for x in (z1, z2, p1, p2, *targets)]
        settings = dict(self.config.loss_settings)
        if self.method.schedule is not None and epoch is not None:
            settings = self.method.schedule(settings, epoch)
        branches = Branches(
            *rows,  # type: ignore[arg-type, misc]
            queue=self.queue if self.config.queue_size else None,
            prototypes=F.normalize(self.prototypes, dim=1) if self.config.prototypes else None,
        )
        loss = self.method.loss(branches, **settings)
        if branches.queue is not None and self.training:
            assert branches.t2 is not None
            self._enqueue(branches.t2)
        probe_loss, correct = self._probe(features, labels)
        return SSLOutput(
            loss=loss, probe_loss=probe_loss, probe_correct=correct, features=features, embedding=embedding
        )

    def _probe(self, features: Tensor, labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if self.probe is None or labels is None:
            return None, None
        logits = self.probe(features.detach()).float()
        return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        """The oldest keys make room; the queue need not be a multiple of the batch."""
        size = len(self.queue)
        if len(keys) > size:
            raise ValueError(
                f"queue_size={size} is smaller than a batch of {len(keys)} keys. Set queue_size to at least that."
            )
        places = (self.queue_end + torch.arange(len(keys), device=keys.device)) % size
        self.queue[places] = F.normalize(keys.to(self.queue.dtype), dim=1)
        self.queue_end.copy_((self.queue_end + len(keys)) % size)


@torch.no_grad()
def zero_init_residual(backbone: nn.Module) -> None:
    """The last normalisation of each residual branch starts at 0, so that each block starts as the identity."""
    for module in backbone.modules():
        if isinstance(module, (ResNetBasicLayer, ResNetBottleNeckLayer)):
            nn.init.zeros_(module.layer[-1].normalization.weight)  # type: ignore[union-attr, arg-type]


AutoConfig.register("matrix_ssl", SSLConfig)
AutoModel.register(SSLConfig, SSLModel)


def load_backbone(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """The backbone alone, in eval mode: of a run, of one of its checkpoints, or any other model that `AutoModel` loads.

    Args:
        path: a folder, or a name on the Hub.
        kwargs: for `from_pretrained`.

    Raises:
        OSError: from `transformers`, where there is no such model.
        ValueError: the weights lack some that the configuration asks for, which `transformers` would start at random.
    """
    model, report = AutoModel.from_pretrained(path, output_loading_info=True, **kwargs)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{path} lacks {len(missing)} weight(s) of its configuration ({', '.join(missing[:3])}, ...). Save the model again."
        )
    return (model.backbone if isinstance(model, SSLModel) else model).eval()

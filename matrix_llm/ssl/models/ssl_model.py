"""`SSLModel`: a backbone with the heads of one method, as a `transformers` model.

One step, in `SSLModel.forward`:
1. the online network and, if the method has one, the target network process each view in a separate pass
2. the rows of all ranks are gathered
3. the method's loss is taken over these rows
4. the keys go into MoCo's queue, and the online probe sees the detached features

A finished run leaves the backbone alone in its root, so that `AutoModel.from_pretrained(run)` needs nothing from here.

Legend: B images of this rank, C channels, S pixels a side, F features of the backbone, d width of the last head.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from matrix_llm.base.errors import RecipeError
from matrix_llm.ssl.losses.gather import gather_rows
from matrix_llm.ssl.methods import Branches, Method, find_method
from matrix_llm.ssl.models.backbones import feature_dim, pooled, zero_init_residual
from matrix_llm.ssl.models.heads import mlp
from matrix_llm.ssl.models.ssl_config import SSLConfig

__all__ = ["SSLModel", "SSLOutput"]


@dataclass
class SSLOutput(ModelOutput):
    """What `SSLModel` returns for a pair of views; for one view, `features` and `embedding` alone."""

    loss: Tensor | None = None  # () the method's loss alone, over the rows of all ranks
    probe_loss: Tensor | None = None  # () cross-entropy of the online probe, over this rank's rows
    probe_correct: Tensor | None = None  # () share of this rank's rows
    features: Tensor | None = None  # (B, F) of the first view
    embedding: Tensor | None = None  # (B, d) what the loss reads of the first view


class SSLModel(PreTrainedModel):
    """Backbone and online probe, with the projector, predictor, target network, queue and prototypes that the method
    has.

    >>> from transformers import ResNetConfig
    >>> backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    >>> widths = {"projector_widths": [16, 16], "predictor_widths": [4, 16]}
    >>> model = SSLModel(SSLConfig(method="simsiam", backbone_config=backbone, **widths))
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
        assert config.projector_widths is not None
        # 1. The online network
        self.backbone = AutoModel.from_config(config.backbone_config)
        method, width, d = self.method, feature_dim(self.backbone), config.projector_widths[-1]
        self.projector = mlp((width, *config.projector_widths), hidden_bn=method.hidden_bn, end=method.projector_end)
        self.predictor = mlp((d, *config.predictor_widths)) if config.predictor_widths else None
        # 2. What some methods add
        if config.prototypes:
            self.prototypes = nn.Parameter(torch.randn(config.prototypes, d))
        if config.queue_size:
            self.register_buffer("queue", F.normalize(torch.randn(config.queue_size, d), dim=1))
            self.register_buffer("queue_end", torch.zeros((), dtype=torch.long))
        # 3. The online probe, on normalised features, so that one learning rate suits every method
        self.probe = None
        if config.probe_classes:
            self.probe = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, config.probe_classes))
        # 4. The target network, equal to the online one at the start, also where residual branches start at zero
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
        return find_method(self.config.method)

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the heads keep PyTorch's initialisation, as in every released code; the backbone has its own."""

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """target <- momentum * target + (1 - momentum) * online, over parameters; the target keeps its own running
        statistics.
        """
        for online, target in ((self.backbone, self.target_backbone), (self.projector, self.target_projector)):
            if target is None:
                continue
            pairs = zip(online.parameters(), target.parameters(), strict=True)
            for new, old in pairs:
                if momentum == 0:
                    old.copy_(new)
                else:
                    old.lerp_(new, 1 - momentum)

    def forward(
        self,
        pixel_values: Tensor,  # (B, C, S, S)
        pixel_values2: Tensor | None = None,  # (B, C, S, S) another view of the same images
        labels: Tensor | None = None,  # (B,) for the online probe
        epoch: float | None = None,  # for a loss with a schedule; None is the end of the schedule
    ) -> SSLOutput:
        """The loss of a pair of views, or the features and the embedding of one view.

        Raises:
            RecipeError: a queue that is shorter than the batch, or loss settings that cannot work.
            NonFiniteRowsError: NaN or infinity in the rows that the loss reads.
        """
        # 1. One pass for each view, so that batch normalisation sees one kind of view at a time, as in the released
        # codes
        features, z1, p1 = self.online_branch(pixel_values)
        embedding = z1 if p1 is None else p1
        if pixel_values2 is None:
            return SSLOutput(features=features, embedding=embedding)
        z2 = p2 = t1 = t2 = None
        if not self.method.one_sided:
            _, z2, p2 = self.online_branch(pixel_values2)
        if self.method.target:
            t1 = None if self.method.one_sided else self.target_branch(pixel_values)
            t2 = self.target_branch(pixel_values2)
        # 2. The rows of all ranks
        branches = self._gather(z1, z2, p1, p2, t1, t2)
        # 3. The loss
        settings = dict(self.config.loss_settings)
        if self.method.schedule is not None and epoch is not None:
            settings = self.method.schedule(settings, epoch)
        loss = self.method.loss(branches, **settings)
        # 4. The queue, only after the loss has read it: no key may be its own negative
        if branches.queue is not None and self.training:
            assert branches.t2 is not None
            self.enqueue(branches.t2)
        probe_loss, correct = self._probe(features, labels)
        return SSLOutput(
            loss=loss, probe_loss=probe_loss, probe_correct=correct, features=features, embedding=embedding
        )

    def online_branch(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features (B, F), projections (B, d) and predictions (B, d), or None without a predictor."""
        features = pooled(self.backbone, pixel_values)
        z = self.projector(features)
        return features, z, None if self.predictor is None else self.predictor(z)

    @torch.no_grad()
    def target_branch(self, pixel_values: Tensor) -> Tensor:
        """The target network's projections (B, d), without gradients."""
        assert self.target_backbone is not None
        assert self.target_projector is not None
        return self.target_projector(pooled(self.target_backbone, pixel_values))

    def _gather(self, *branches: Tensor | None) -> Branches:
        """The branches with the rows of all ranks. Those that the method does not have stay None."""
        gathered = iter(gather_rows(*(x for x in branches if x is not None)))
        return Branches(
            *(None if x is None else next(gathered) for x in branches),  # type: ignore[arg-type, misc]
            queue=self.queue if self.config.queue_size else None,
            prototypes=F.normalize(self.prototypes, dim=1) if self.config.prototypes else None,
        )

    def _probe(self, features: Tensor, labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Loss and accuracy of the online probe, whose gradient stops at the features."""
        if self.probe is None or labels is None:
            return None, None
        logits = self.probe(features.detach()).float()
        return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write the keys over the oldest ones; the queue's length need not be a multiple of the batch."""
        size = len(self.queue)
        if len(keys) > size:
            raise RecipeError(
                f"queue_size={size} is smaller than a batch of {len(keys)} keys. Set queue_size to at least "
                f"{len(keys)}."
            )
        places = (self.queue_end + torch.arange(len(keys), device=keys.device)) % size
        self.queue[places] = F.normalize(keys.to(self.queue.dtype), dim=1)
        self.queue_end.copy_((self.queue_end + len(keys)) % size)


AutoConfig.register("matrix_ssl", SSLConfig)
AutoModel.register(SSLConfig, SSLModel)

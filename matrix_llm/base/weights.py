"""Weights that have just been loaded: complete, finite, and of this model. transformers only warns where they are not.

A tensor that a checkpoint lacks is drawn at random, one that the model has no place for is dropped, and both are told
in a table among the progress bars.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matrix_llm.base.errors import ModelError

WAY_OUT = "Download or save the weights again, or correct config.json."


def check_weights(model: Any, info: Mapping[str, Any], name: str) -> list[str]:
    """Refuse weights that are not those of the model, and return what else is worth saying, one sentence each.

    Tied weights, buffers and what an architecture declares as optional are no gaps; transformers leaves them out of
    `info`. Weights of another head, such as a value head, change nothing and are only said.

    Args:
        info: what `from_pretrained(..., output_loading_info=True)` returns beside the model.
        name: folder or Hub id, for messages.

    Raises:
        ModelError: a tensor is missing, unexpected or not finite.
    """
    # 1. what the checkpoint lacks; bitsandbytes names parts of its packed weights, which are no tensors of the file
    quantised = bool(getattr(model, "is_quantized", False))
    missing = sorted(key for key in info["missing_keys"] if not quantised or key.endswith((".weight", ".bias")))
    if missing:
        raise ModelError(f"{name} lacks {_some(missing)}, which would be drawn at random. {WAY_OUT}")
    # 2. what the model has no place for
    inside = tuple(f"{part}." for part in (model.base_model_prefix, "lm_head") if part)
    unexpected = sorted(info["unexpected_keys"])
    own = [key for key in unexpected if key.startswith(inside) and not quantised]
    if own:
        raise ModelError(f"{name} holds {_some(own)}, for which the model of its config.json has no place. {WAY_OUT}")
    # 3. their values
    check_finite(model, name)
    others = [key for key in unexpected if key not in own]
    return [f"{name} also holds {_some(others)}, of another head: not used"] if others and not quantised else []


def check_finite(model: Any, name: str) -> None:
    """Refuse a model with NaN or infinity in a weight. What is on the meta device, or in integers, is passed over.

    Raises:
        ModelError: on every process, if any of them holds such a weight under ZeRO-3.
    """
    bad = [key for key, parameter in model.named_parameters() if not _is_finite(parameter)]
    if any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):  # each process has a part
        from torch import distributed

        found: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(found, bad)
        bad = sorted({key for keys in found for key in keys})
    if bad:
        raise ModelError(f"{name} holds NaN or infinity in {_some(bad)}. Use other weights: these cannot compute.")


def check_files_finite(folder: Path) -> None:
    """Refuse a folder whose safetensors hold NaN or infinity, for an engine that loads them by itself.

    Raises:
        ModelError: it names the file and the tensor.
    """
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            bad = [name for name in file.keys() if not _is_finite(file.get_tensor(name))]  # noqa: SIM118 - not a dict
        if bad:
            raise ModelError(f"{path} holds NaN or infinity in {_some(bad)}. Use other weights: these cannot compute.")


def _is_finite(parameter: Any) -> bool:
    """Of a parameter, or of the part of it that this process holds."""
    part = getattr(parameter, "ds_tensor", parameter).detach()
    if part.device.type == "meta" or part.numel() == 0 or not part.dtype.is_floating_point:
        return True
    if part.element_size() == 1:  # float8 has no minimum
        part = part.float()
    return all(math.isfinite(end.item()) for end in part.aminmax())  # NaN is its own minimum; no copy is made


def check_adapter(adapted: Any, folder: Path, name: str) -> None:
    """Refuse an adapter's file that lacks a tensor of the adapter, or holds one that the model has no place for.

    Args:
        adapted: a PEFT model that has loaded the adapter in `folder`.

    Raises:
        ModelError: it names the tensor.
    """
    missing, unknown = adapter_gaps(adapted, folder)
    if missing:
        raise ModelError(f"{name} lacks {_some(missing)}. Save the adapter again, or put it on its own base model.")
    if unknown:
        raise ModelError(
            f"{name} holds {_some(unknown)}, for which its base model has no place. Put it on its own base model."
        )


def adapter_gaps(adapted: Any, folder: Path) -> tuple[list[str], list[str]]:
    """The tensors that the adapter in `folder` lacks, and those that the PEFT model has no place for, by name."""
    from peft import get_peft_model_state_dict

    saved = _names_in(folder)
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    copies = set(get_peft_model_state_dict(adapted, save_embedding_layers=True))  # of the base's embeddings
    return sorted(wanted - saved), sorted(saved - wanted - copies)


def _names_in(folder: Path) -> set[str]:
    import torch
    from safetensors import safe_open

    if (folder / "adapter_model.safetensors").is_file():
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            return set(file.keys())
    return set(torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True))


def _some(names: Iterable[str]) -> str:
    """The first of the names, and how many there are."""
    names = list(names)
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} other tensors"

"""Plain safetensors of a ZeRO or FSDP2 checkpoint, whose weights are in shards: the `consolidate` command.

It runs in one process, without a GPU or a launcher, and needs memory for one copy of the float32 weights.

Both engines store shards in pickles, which can hold code. They are read as run/pickles.py says: a checkpoint from
elsewhere cannot run code here.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from matrix_llm.base.errors import CheckpointError, one_line
from matrix_llm.run.checkpoint_files import MANIFEST, what_is_missing
from matrix_llm.run.failures import cannot_write, why_not_written
from matrix_llm.run.pickles import read_index, tensors_only

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

COPIED = (".json", ".jinja", ".model", ".txt")  # suffixes of configs, tokenizer files and chat templates
NOT_COPIED = ("trainer_state.json", MANIFEST, "log_window")  # prefixes of files that only resuming needs


def consolidate(checkpoint: Path, out: Path) -> None:
    """Write the float32 weights of a ZeRO or FSDP2 checkpoint, its config and its tokenizer for `from_pretrained`.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or not sharded, or `out` is not a new or empty folder.
    """
    # 1. both places can be used
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a folder. Give a checkpoint's path, such as runs/x/checkpoint-20.")
    if (reason := what_is_missing(checkpoint)) is not None:
        raise CheckpointError(f"{checkpoint} is incomplete: {reason}. Give another checkpoint.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder. Give another place.")
    # 2. the shards
    try:
        state = _read_shards(checkpoint)
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:  # a damaged or hostile one fails in any way
        reason = f"{type(error).__name__}: {one_line(error)}"[:300]
        raise CheckpointError(f"{checkpoint} could not be read: {reason}. Give another checkpoint.") from error
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{checkpoint} holds something else than weights. Give another checkpoint.")
    if any(".lora_" in name for name in state):
        raise CheckpointError(
            f"{checkpoint} holds a LoRA adapter, which is not sharded. Read it with PeftModel.from_pretrained as it is."
        )
    # 3. plain files, in a temporary folder that takes the name `out` when it is complete
    staged = out.with_name(f".{out.name}.consolidating")
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        save_torch_state_dict(_separate_storages(state), staged, metadata={"format": "pt"})
        for file in checkpoint.iterdir():
            is_weights = "safetensors" in file.name
            if file.suffix in COPIED and not is_weights and not file.name.startswith(NOT_COPIED) and file.is_file():
                _check_inside(file, checkpoint)
                shutil.copy(file, staged / file.name)
        if out.exists():
            out.rmdir()
        os.rename(staged, out)
    except Exception as error:
        if (reason := why_not_written(error)) is None:
            raise
        raise cannot_write(out, reason, checkpoint.parent) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _check_inside(file: Path, folder: Path) -> None:
    """Refuse a link out of the checkpoint: what it leads to would be published with the weights."""
    if not file.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{file} leads to {file.resolve()}, outside the checkpoint. Remove it, or copy the file.")


def _read_shards(checkpoint: Path) -> dict[str, Tensor]:
    """The weights by name, from whichever engine wrote the checkpoint."""
    if (checkpoint / "latest").is_file():
        return _read_zero(checkpoint)
    if (shards := checkpoint / "pytorch_model_fsdp_0").is_dir():
        return _read_fsdp(shards)
    if (unsharded := checkpoint / "pytorch_model_fsdp.bin").is_file():
        return dict(torch.load(unsharded, map_location="cpu", weights_only=True, mmap=True))
    raise CheckpointError(f"{checkpoint} has no shards of ZeRO or FSDP2. Read it with from_pretrained as it is.")


def _separate_storages(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each weight in its own storage; tied weights stay one tensor.

    ZeRO-2's weights are slices of one flat buffer, which safetensors refuses to save.
    """
    copies: dict[tuple, Tensor] = {}
    for value in state.values():
        key = (value.data_ptr(), value.shape, value.stride())
        if key not in copies:
            is_slice = value.untyped_storage().nbytes() != value.nbytes
            copies[key] = value.clone(memory_format=torch.contiguous_format) if is_slice else value.contiguous()
    return {name: copies[value.data_ptr(), value.shape, value.stride()] for name, value in state.items()}


# -------------------------------------------------------------------------------------------------------- DeepSpeed


def _read_zero(checkpoint: Path) -> dict[str, Tensor]:
    """The float32 master weights, which the optimizer holds; the model's own weights may be bfloat16 copies."""
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError:
        raise CheckpointError(
            f"{checkpoint} was made with DeepSpeed, which is not installed. Run pip install -e '.[deepspeed]'."
        ) from None
    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    _check_inside(checkpoint / tag, checkpoint)
    with tensors_only(), contextlib.redirect_stdout(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))


# ------------------------------------------------------------------------------------------------------------ FSDP2


def _read_fsdp(shards: Path) -> dict[str, Tensor]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.metadata import StorageMeta
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    # 1. the index: tensors alone, and no more of them than the shards can hold
    metadata = read_index(shards)
    _check_tensors(metadata, shards)

    # 2. the shards; torch's own reader would unpickle the index again, unguarded
    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    state: dict[str, Any] = {}
    with tensors_only():
        _load_state_dict(state, storage_reader=Reader(shards), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return dict(_flat(state["model"]))


def _check_tensors(metadata: Metadata, shards: Path) -> None:
    """Refuse entries that are not tensors: torch unpickles those, whatever they hold; and sizes that nothing backs."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = metadata.state_dict_metadata
    tensors = [entry for entry in entries.values() if isinstance(entry, TensorStorageMetadata)]
    if len(tensors) < len(entries):
        others = sorted(name for name, entry in entries.items() if not isinstance(entry, TensorStorageMetadata))
        raise CheckpointError(
            f"{shards} holds {others[0]!r}, which is not a tensor and could run code when it is read. Give another "
            "checkpoint."
        )
    claimed = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in tensors)
    there = sum(file.stat().st_size for file in shards.iterdir() if file.is_file())
    if claimed > there:
        raise CheckpointError(
            f"{shards} lists {claimed:,} bytes of weights, but its files have {there:,}. Give another checkpoint."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

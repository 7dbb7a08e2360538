"""Plain safetensors of a ZeRO or FSDP2 checkpoint, whose weights are in shards: the `consolidate` command.

It runs in one process, without a GPU or a launcher, and needs memory for one copy of the float32 weights.

Both engines store shards in pickles, which can hold code. They are read with torch's `weights_only` loader and, for
the index of FSDP2, with an unpickler that knows only the index's own classes: a checkpoint from elsewhere cannot run
code here.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from matrix_llm.base.errors import CheckpointError
from matrix_llm.run.checkpoint_files import MANIFEST, what_is_missing
from matrix_llm.run.failures import cannot_write, why_not_written

# What reading a damaged or hostile checkpoint raises
DAMAGED = (OSError, EOFError, RuntimeError, pickle.UnpicklingError, CheckpointException)
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
    except DAMAGED as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise CheckpointError(f"{checkpoint} could not be read: {reason}. Give another checkpoint.") from error
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
            if file.suffix in COPIED and not is_weights and not file.name.startswith(NOT_COPIED):
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


def _read_shards(checkpoint: Path) -> dict[str, Tensor]:
    """The weights by name, from whichever engine wrote the checkpoint."""
    if (checkpoint / "latest").is_file():
        return _read_zero(checkpoint)
    if (shards := checkpoint / "pytorch_model_fsdp_0").is_dir():
        return _read_fsdp(shards)
    if (unsharded := checkpoint / "pytorch_model_fsdp.bin").is_file():
        return torch.load(unsharded, map_location="cpu", weights_only=True, mmap=True)
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


@contextlib.contextmanager
def _only_weights() -> Iterator[None]:
    """Within the block, every torch.load refuses pickles that hold more than tensors and DeepSpeed's own classes.

    That includes DeepSpeed's own calls, which ask for `weights_only=False`.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _read_zero(checkpoint: Path) -> dict[str, Tensor]:
    """The float32 master weights, which the optimizer holds; the model's own weights may be bfloat16 copies."""
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError:
        raise CheckpointError(
            f"{checkpoint} was made with DeepSpeed, which is not installed. Run pip install -e '.[deepspeed]'."
        ) from None
    with _only_weights(), contextlib.redirect_stdout(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))


# ------------------------------------------------------------------------------------------------------------ FSDP2


class _IndexUnpickler(pickle.Unpickler):
    """Reads the index of torch.distributed.checkpoint: its own classes, sizes and dtypes, nothing that runs code."""

    ALLOWED = {  # noqa: RUF012
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "collections": {"OrderedDict"},
        "pathlib": {"PosixPath", "PurePosixPath", "Path"},
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which does not belong in a checkpoint")


def _read_fsdp(shards: Path) -> dict[str, Tensor]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    # 1. the index, read by the careful unpickler
    with (shards / ".metadata").open("rb") as file:
        metadata: Metadata = _IndexUnpickler(file).load()

    # 2. the shards; torch's own reader would unpickle the index again, unguarded
    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    state: dict[str, Any] = {}
    _load_state_dict(state, storage_reader=Reader(shards), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return dict(_flat(state["model"]))


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

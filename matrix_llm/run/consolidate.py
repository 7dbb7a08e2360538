"""Plain safetensors of a checkpoint that ZeRO or FSDP2 has cut into shards: `python -m matrix_llm.checkpoints consolidate`.

It runs in one process, without a GPU and without the launcher, and needs memory for the float32 weights once.

Both engines store shards in pickles. They are read with torch's `weights_only` loader and, for the index of FSDP2, with an
unpickler that knows the index's own classes alone: a checkpoint from elsewhere cannot run code here.
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

from matrix_llm.base.errors import CheckpointError
from matrix_llm.run.checkpoint_files import MANIFEST, not_written, what_is_missing, why_not_written

NOT_FOR_USE = ("trainer_state.json", MANIFEST, "log_window")  # what resuming needs, and plain weights do not


def consolidate(checkpoint: Path, out: Path) -> None:
    """Write the float32 weights of a ZeRO or FSDP2 checkpoint, its config and its tokenizer for `from_pretrained`.

    Raises:
        CheckpointError: the checkpoint is not whole, holds nothing to consolidate, or `out` is not an empty place.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a folder. Give a checkpoint's path, such as runs/x/checkpoint-20.")
    if (reason := what_is_missing(checkpoint)) is not None:
        raise CheckpointError(f"{checkpoint} is not whole: {reason}. Give another checkpoint.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder. Give another place.")
    staged = out.with_name(f".{out.name}.consolidating")
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        if (checkpoint / "latest").is_file():
            state = _read_zero(checkpoint)
        elif (shards := checkpoint / "pytorch_model_fsdp_0").is_dir():
            state = _read_fsdp(shards)
        elif (whole := checkpoint / "pytorch_model_fsdp.bin").is_file():
            state = torch.load(whole, map_location="cpu", weights_only=True, mmap=True)
        else:
            raise CheckpointError(f"{checkpoint} has no shards of ZeRO or FSDP2: from_pretrained reads it as it is.")
        if any(".lora_" in name for name in state):
            raise CheckpointError(
                f"{checkpoint} holds a LoRA adapter, which is not sharded: PeftModel.from_pretrained reads it as it is."
            )
        save_torch_state_dict(_on_their_own(state), staged, metadata={"format": "pt"})
        for file in checkpoint.iterdir():
            is_kept = file.suffix in (".json", ".jinja", ".model", ".txt") and not file.name.startswith(NOT_FOR_USE)
            if is_kept and "safetensors" not in file.name:
                shutil.copy(file, staged / file.name)
        if out.exists():
            out.rmdir()
        os.rename(staged, out)
    except CheckpointError:
        raise
    except BaseException as error:
        if (
            not isinstance(error, Exception) and type(error).__name__ != "CheckpointException"
        ):  # torch.distributed's is a BaseException
            raise
        if (reason := why_not_written(error)) is not None:
            raise not_written(out, reason, checkpoint.parent) from error
        raise CheckpointError(
            f"{checkpoint} could not be read: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _on_their_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """ZeRO-2's weights are slices of one flat buffer, which safetensors would not save; tied ones stay one tensor."""
    copies: dict[tuple, Tensor] = {}
    for value in state.values():
        key = (value.data_ptr(), value.shape, value.stride())
        if key not in copies:
            is_slice = value.untyped_storage().nbytes() != value.nbytes
            copies[key] = value.clone(memory_format=torch.contiguous_format) if is_slice else value.contiguous()
    return {name: copies[value.data_ptr(), value.shape, value.stride()] for name, value in state.items()}


# ------------------------------------------------------------------------------------------------------------ DeepSpeed


@contextlib.contextmanager
def _only_weights() -> Iterator[None]:
    """Every torch.load inside, DeepSpeed's `weights_only=False` ones too, refuses pickles that hold more than tensors and DeepSpeed's
    own enumerations."""
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
    """The float32 masters, which the optimizer holds; the weights beside them may be bfloat16 copies."""
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError:
        raise CheckpointError(
            f"{checkpoint} was made with DeepSpeed, which is not installed: pip install -e '.[deepspeed]'."
        ) from None
    with _only_weights(), contextlib.redirect_stdout(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))


# ----------------------------------------------------------------------------------------------------------------- FSDP2


class _IndexUnpickler(pickle.Unpickler):
    """Reads the `.metadata` of torch.distributed.checkpoint: its own classes, sizes and dtypes, and nothing that could run code."""

    ALLOWED = {  # noqa: RUF012
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "collections": {"OrderedDict"},
        "pathlib": {"PosixPath", "PurePosixPath", "Path"},
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
            "StorageMeta", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which is no part of a checkpoint")


def _read_fsdp(shards: Path) -> dict[str, Tensor]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    with (shards / ".metadata").open("rb") as file:
        metadata: Metadata = _IndexUnpickler(file).load()

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

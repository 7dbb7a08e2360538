"""How a run is spread over processes, known before a weight is loaded."""

import os
from dataclasses import dataclass

from trl import SFTConfig


@dataclass(frozen=True)
class Sharding:
    """How the model is spread over processes, known before a weight is loaded."""

    tensor_parallel: int
    """Processes that share each layer's weights, by Accelerate's parallelism config."""
    sequence_parallel: int
    """Processes that share each row's tokens, by DeepSpeed."""
    context_parallel: int
    """Processes that share each row's tokens, by ring attention."""
    deepspeed_tensor_parallel: int
    """Processes that share each layer's weights, by the `tensor_parallel` block of the DeepSpeed config."""
    fsdp_version: str | None
    """"1", "2", or None without FSDP."""

    @classmethod
    def of(cls, training: SFTConfig) -> "Sharding":
        """From the settings where they say so, else from the environment that `accelerate launch` prepares."""
        blocks = training.deepspeed_plugin.deepspeed_config if training.deepspeed_plugin is not None else {}
        fsdp = training.fsdp_plugin_args or {}
        version = str(fsdp.get("fsdp_version") or os.environ.get("FSDP_VERSION", "1"))
        return cls(
            tensor_parallel=cls._parallel_size(training, "tp_size"),
            sequence_parallel=cls._parallel_size(training, "sp_size"),
            context_parallel=cls._parallel_size(training, "cp_size"),
            deepspeed_tensor_parallel=int(blocks.get("tensor_parallel", {}).get("autotp_size", 1)),
            fsdp_version=version if fsdp or environment_says("ACCELERATE_USE_FSDP") else None,
        )

    @staticmethod
    def _parallel_size(training: SFTConfig, name: str) -> int:
        if training.parallelism_config is not None:
            return getattr(training.parallelism_config, name) or 1
        if environment_says("ACCELERATE_USE_PARALLELISM_CONFIG"):
            return int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1"))
        return 1


def environment_says(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"

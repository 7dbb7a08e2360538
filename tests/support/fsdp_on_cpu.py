"""FSDP2 on CPU processes.

On a CPU accelerate silently trains with DDP when asked for FSDP, which it uses only with several accelerators.
`allow()` makes it do on gloo what it does on NCCL; call it before the first Accelerator is built.
"""

from accelerate import state
from accelerate.utils import DistributedType


def allow() -> None:
    build = state.AcceleratorState.__init__

    def built(self, *args, fsdp_plugin=None, **kwargs) -> None:
        build(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = built

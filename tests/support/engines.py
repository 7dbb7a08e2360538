"""What a test needs to run an engine on the CPU: a port, a DeepSpeed file for tiny models, or the reason to skip."""

import importlib.util
import json
import os
import shutil
import socket
import sys
from pathlib import Path

from tests.support.paths import ROOT, SUPPORT


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def deepspeed_config(path: Path, stage: int | str) -> str:
    """Write ds_configs/ for `stage` (3, or a name such as "zero3_offload") to `path`, adapted to tiny CPU models."""
    name = stage if isinstance(stage, str) else f"zero{stage}"
    blocks = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    blocks["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW, as on every other engine
    # By default ZeRO-3 leaves tensors under 100,000 elements whole, and every weight of a tiny model is smaller.
    blocks["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path.write_text(json.dumps(blocks))
    return str(path)


def why_no_deepspeed() -> str | None:
    """The reason why DeepSpeed cannot run here, or None if it can."""
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed (pip install -e .[deepspeed])"
    ninja = shutil.which("ninja") is not None or Path(sys.executable).with_name("ninja").exists()
    if shutil.which("g++") is None or not ninja:
        return "DeepSpeed compiles its CPU communication op, which needs g++ and ninja"
    return None


def skip_without_deepspeed(engine: str) -> None:
    """Skip the test, with the reason, if `engine` is one of DeepSpeed's and DeepSpeed cannot run here."""
    import pytest  # here: benchmarks import this module too

    if engine.startswith("zero") and (reason := why_no_deepspeed()):
        pytest.skip(reason)


def environment() -> dict[str, str]:
    """The environment of a process that trains on the CPU and imports this checkout."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
    }
    env["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), str(ROOT), env.get("PYTHONPATH", "")])
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])  # ninja, for DeepSpeed's op
    return env

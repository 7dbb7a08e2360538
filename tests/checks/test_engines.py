"""The settings inside `fsdp_config` and the DeepSpeed config (checks/engines.py), compared with the engines' own."""

import inspect
import json
import re

import pytest
from transformers import TrainingArguments

from matrix_llm.base.errors import RecipeError
from matrix_llm.checks.engines import (
    DEEPSPEED,
    DEEPSPEED_OLDER,
    FSDP,
    FSDP_VERSION_1,
    check_deepspeed,
    check_engines,
    check_fsdp,
)
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"transformer_layer_cls_to_warp": "X"}, "'transformer_layer_cls_to_warp'.*Did you mean transformer_layer_cls"),
        ({"fsdp_offload_params": True}, "'fsdp_offload_params' is not a setting.* cpu_offload.*Correct or remove"),
        ({"fsdp_sharding_strategy": "FULL_SHARD"}, "'fsdp_sharding_strategy'.* reshard_after_forward"),
        ({"version": 2, "fsdp_version": 1}, "'version' and 'fsdp_version' are the same.*Remove one"),
        ({"version": 3}, "version=3 is not 1 or 2.*Write 2"),
        ({"version": "two"}, "version='two' is not 1 or 2"),
        ({"use_orig_params": True}, "'use_orig_params' is read by FSDP version 1 alone.*Remove it"),
        ({"version": 1, "forward_prefetsh": True}, "'forward_prefetsh'.*Did you mean forward_prefetch"),
    ],
)
def test_an_fsdp_setting_that_would_do_nothing_is_refused(settings, said, tmp_path):
    (tmp_path / "fsdp.json").write_text(json.dumps(settings))
    for given in (settings, str(tmp_path / "fsdp.json")):
        with pytest.raises(RecipeError, match=f"fsdp_config.*{said}"):
            check_engines({"fsdp_config": given})


def test_fsdp_settings_that_are_read_pass():
    check_fsdp("fsdp_config", {"fsdp_version": 2, "auto_wrap_policy": "NO_WRAP", "fsdp_reshard_after_forward": False})
    check_fsdp("fsdp_config", {"version": 1, "use_orig_params": True, "backward_prefetch": "NO_PREFETCH"})
    check_fsdp("fsdp_config", {"version": 1.0, "use_orig_params": True})
    check_fsdp("fsdp_config", {"_comment": "as on the old machine", "version": "2"})


def test_every_fsdp_setting_that_transformers_reads_is_known():
    source = inspect.getsource(TrainingArguments._process_fsdp_args)
    read = set(re.findall(r'self\.fsdp_config(?:\.get\(|\.setdefault\(|\[)"(\w+)"', source))
    read |= set(re.findall(r'"(\w+)" in self\.fsdp_config', source))
    assert len(read) > 12
    assert read <= {*FSDP, *FSDP_VERSION_1}


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ({"zero_optimisation": {"stage": 3}}, "'zero_optimisation'.*Did you mean zero_optimization"),
        ({"scheduler": {"type": "WarmupLR"}}, "`scheduler` block.*Remove the block"),
    ],
)
def test_a_deepspeed_block_that_would_do_nothing_is_refused_inline_too(blocks, said):
    with pytest.raises(RecipeError, match=f"deepspeed.*{said}"):
        check_engines({"deepspeed": blocks})


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ({"zero_optimization": {"stag": 3}}, "zero_optimization: 'stag'.*Did you mean stage"),
        ({"bf16": {"enable": True}}, "bf16: 'enable'.*Did you mean enabled"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}},
            "zero_optimization.offload_param: 'devise'.*Did you mean device",
        ),
    ],
)
def test_a_setting_inside_a_deepspeed_block_is_compared_with_deepspeeds_own(blocks, said):
    pytest.importorskip("deepspeed", reason="DeepSpeed defines its settings")
    with pytest.raises(RecipeError, match=f"deepspeed: {said}"):
        check_deepspeed("deepspeed", blocks)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_the_configs_that_are_shipped_pass(name):
    check_engines({"deepspeed": str(ROOT / "ds_configs" / f"{name}.json")})


@pytest.mark.parametrize("key", ["_comment", "//", "$schema"])
def test_a_comment_in_a_deepspeed_config_is_not_a_setting(key):
    check_deepspeed("deepspeed", {key: "from the old machine", "train_batch_size": "auto"})


@pytest.mark.parametrize("key", ["elasticity", "nebula", "sparse_gradients", "amp"])
def test_a_block_of_some_deepspeeds_is_refused_by_those_that_removed_it(key):
    config = pytest.importorskip("deepspeed.runtime.config", reason="DeepSpeed defines its settings")
    if key not in getattr(config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {}):
        check_deepspeed("deepspeed", {key: {}})
    else:
        with pytest.raises(RecipeError, match=f"'{key}'.*removed.*Remove it"):
            check_deepspeed("deepspeed", {key: {}})


class Reads(dict):
    """An empty mapping that remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set()

    def get(self, name, default=None):
        self.names.add(name)
        return default

    def __contains__(self, name):
        self.names.add(name)
        return False

    def __getitem__(self, name):
        self.names.add(name)
        return {}

    def __bool__(self):
        return True

    def keys(self):
        return self


def test_every_block_that_deepspeed_reads_is_known():
    config = pytest.importorskip("deepspeed.runtime.config", reason="DeepSpeed defines its settings")
    blocks = Reads()
    object.__new__(config.DeepSpeedConfig)._initialize_params(blocks)
    assert len(blocks.names) > 40
    assert blocks.names <= {*DEEPSPEED, *DEEPSPEED_OLDER}

"""Two real processes on the CPU (gloo) give the numbers of one, step by step: DDP, ZeRO-1 to 3, FSDP2.

Each engine runs all cases in the same two processes (support/parity_runs.py). `python benchmarks/parity.py` prints the
differences.
"""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.support.engines import deepspeed_config, environment, free_port, skip_without_deepspeed
from tests.support.parity_runs import CASES, ENGINES, REFERENCE, SHORT, STEPS, differences, shared_runner
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
OTHERS = [name for name in ENGINES if name != REFERENCE]


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return shared_runner(tmp_path_factory.mktemp("parity"))


def moved(found, models, architecture):
    """Largest change of any weight since the checkpoint, and those weights that have not changed at all."""

    def plain(name):
        return name.removeprefix("base_model.model.").replace(".base_layer", "")

    before, after = (
        load_file(models / architecture / "model.safetensors"),
        {plain(k): v for k, v in found.weights.items()},
    )
    change = {name: (after[name] - value).abs().max().item() for name, value in before.items()}
    return max(change.values()), {name for name, value in change.items() if value == 0}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", OTHERS)
def test_any_engine_and_any_accumulation_match_one_process(engine, case, runner):
    """In loss, CE, MCE and gradient norm of every step, and in the final weights.

    Three one-row micro-batches have no trained token.
    """
    skip_without_deepspeed(engine)
    got, expected = runner.results(engine)[case], runner.results(REFERENCE)[case]
    found = differences(got, expected)
    weights = found.pop("weights")  # Adam divides by the gradient's size, so rounding moves them: up to 1.14e-5 on AVX2
    assert max(found.values()) < TOLERANCE, found
    assert weights < (20 if case == "kd" else 2) * TOLERANCE


def test_twenty_steps_move_weights_and_loss_by_far_more_than_the_tolerance(runner):
    for case, (settings, _) in CASES.items():
        found = runner.results(REFERENCE)[case]
        assert len(found.curve("loss")) == (5 if case in SHORT else STEPS)
        assert max(found.curve("loss")) - min(found.curve("loss")) > (0.03 if "token_loss" in settings else 0.1)
        names = ("loss", "token_loss" if "token_loss" in settings else "ce", "mce")
        assert all(
            loss == pytest.approx(value + mce, rel=1e-4 if settings.get("token_loss") == "ntl" else 1e-5)
            for loss, value, mce in zip(*map(found.curve, names), strict=True)
        )
        if "lora" not in settings:
            assert moved(found, runner.models, settings["architecture"])[0] > 100 * TOLERANCE


@pytest.mark.parametrize("engine", OTHERS)
def test_the_engine_is_the_one_asked_for_and_shards_the_head(engine, runner):
    """On a CPU accelerate may train with DDP when asked for FSDP, and ZeRO-3 leave weights whole: neither here."""
    skip_without_deepspeed(engine)
    for case, found in runner.results(engine).items():
        seen = found.engine
        assert seen["processes"] == ENGINES[engine].processes
        assert seen["zero_stage"] == (int(engine[4]) if engine.startswith("zero") else 0), case
        assert seen["head_is_partitioned"] == engine.startswith("zero3"), case
        assert seen["head_is_dtensor"] == (engine == "fsdp2"), case
        assert seen["offloads"] == (engine == "zero3_offload"), case
        assert (seen["wrapper"] == "DistributedDataParallel") == (engine == "ddp"), case


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_beside_training_is_given_the_whole_weights_of_each_step(engine, runner):
    skip_without_deepspeed(engine)
    trained, folder = runner.results(engine)["centred"], runner.folder / engine / "centred"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-0", "step-2", "step-4", "step-5"]
    first, last = (load_file(folder / f"step-{step}" / "model.safetensors") for step in (0, 5))
    for name, expected in load_file(runner.models / "llama_tied" / "model.safetensors").items():
        assert torch.equal(first[name], expected), name
    assert last.keys() <= trained.weights.keys()
    assert all(torch.equal(last[name], trained.weights[name]) for name in last)
    assert trained.curve("accuracy_step") == [0, 2, 4, 5]


@pytest.mark.parametrize("engine", ENGINES)
def test_lora_trains_the_adapter_and_leaves_the_base_bit_for_bit(engine, runner):
    skip_without_deepspeed(engine)
    found = runner.results(engine)["LoRA"]
    base = {n.removesuffix(".weight") for n in load_file(runner.models / "llama" / "model.safetensors")}
    assert len(moved(found, runner.models, "llama")[1]) == len(base)
    adapters = {name: value for name, value in found.weights.items() if "lora_B" in name}
    assert len(adapters) == 2 * 3
    assert all(value.abs().max() > 100 * TOLERANCE for value in adapters.values())  # they start at zero


@pytest.mark.parametrize("engine", ENGINES)
def test_the_vocabulary_is_summarised_once_a_step_however_many_micro_batches(engine, runner):
    """The reference summarises it for every micro-batch, so a summary of an older step would show as a difference."""
    skip_without_deepspeed(engine)
    assert runner.results(engine)["top_k 16"].summaries == STEPS
    assert runner.results(engine)["centred"].summaries == 5
    assert runner.results(engine)["untied"].summaries == 0  # a small vocabulary is solved whole


@pytest.mark.parametrize("engine", ENGINES)
def test_tied_weights_stay_one_parameter_through_training(engine, runner):
    """And one that was trained: sharding that copies it would train the input embeddings alone."""
    skip_without_deepspeed(engine)
    tied, untied = (runner.results(engine)[case] for case in ("tied, embedding_grad", "untied"))
    assert tied.engine["head_is_tied"]
    assert not untied.engine["head_is_tied"]
    before = load_file(runner.models / "llama_tied" / "model.safetensors")["model.embed_tokens.weight"]
    saved = [tied.weights[n] for n in ("lm_head.weight", "model.embed_tokens.weight") if n in tied.weights]
    assert saved
    assert all(torch.equal(each, saved[0]) for each in saved)
    assert (saved[0] - before).abs().max() > 100 * TOLERANCE


FSDP2_FLAGS = [
    "--use_fsdp",
    *("--fsdp_version", "2"),
    *("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"),
]
TRAIN_WITH_FSDP = """
import runpy, sys
from tests.support import fsdp_on_cpu
fsdp_on_cpu.allow()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_sharded_run_of_train_py_saves_whole_weights(engine, tmp_path):
    from transformers import AutoModelForCausalLM

    from tests.support.tiny import TINY

    skip_without_deepspeed(engine)
    settings = {**TINY, "max_steps": 1, "output_dir": str(tmp_path / "run"), "builtin_rows": 16}
    flags, script = FSDP2_FLAGS, [str(ROOT / "matrix_llm" / "train.py")]
    if engine == "zero3":
        flags, settings["deepspeed"] = ["--use_deepspeed"], deepspeed_config(tmp_path / "ds.json", 3)
    else:
        (tmp_path / "start.py").write_text(TRAIN_WITH_FSDP)
        script = [str(tmp_path / "start.py"), *script]
    (tmp_path / "r.yaml").write_text(json.dumps(settings))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *flags,
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port()), *script]
    done = subprocess.run(
        [*command, str(tmp_path / "r.yaml")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1800,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.lm_head.weight.shape == (300, 32)
    assert all(p.isfinite().all() and p.numel() for p in model.parameters())

"""Checkpoints survive kills, full disks and wrong resumptions. Runs are matrix_llm/train.py itself, forked by tests/kill_run.py."""

import atexit
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from matrix_llm.base.files import read_jsonl
from matrix_llm.run.checkpoint_files import (
    MANIFEST,
    finish_checkpoint,
    last_complete_checkpoint,
    remove_old_checkpoints,
    what_is_missing,
)
from matrix_llm.run.checkpoint_files import main as checkpoints_main
from tests.support.engines import deepspeed_config, skip_without_deepspeed
from tests.support.paths import SUPPORT

RECIPE = {  # 3 optimizer steps an epoch, so 8 steps cross two epochs; rows are logged every 3 steps, between the checkpoints
    "model_config": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
        "tie_word_embeddings": False, "attention_dropout": 0.2,
    },
    "tokenizer_vocab_size": 300, "dataset": "builtin", "builtin_rows": 12, "eval_dataset": "builtin", "builtin_eval_rows": 4,
    "eval_strategy": "steps", "eval_steps": 3, "prompt_template": "plain", "max_length": 256, "max_steps": 8, "logging_steps": 3,
    "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2, "learning_rate": 1e-3, "lr_scheduler_type": "cosine",
    "weight_decay": 0.01, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "steps", "save_steps": 2,
    "save_total_limit": 2, "disable_tqdm": True,
}  # fmt: skip
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
}  # fmt: skip
CLOCK = ("runtime", "per_second", "memory")  # what two equal runs may differ in


class Server:
    """tests/kill_run.py, kept open: a run costs its own seconds and no imports."""

    def __init__(self, folder):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "DS_ACCELERATOR": "cpu",
        }
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])  # ninja, for DeepSpeed's op
        self.errors = (folder / "server.log").open("w")
        command = [sys.executable, str(SUPPORT / "kill_run.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=env, cwd=folder
        )

    def run(self, output, *arguments, engine="single", changes=None, **job):
        """Exit codes and what the processes printed, for a run into `output`."""
        folder = output.parent
        folder.mkdir(exist_ok=True)
        settings = {**RECIPE, "output_dir": str(output), "per_device_train_batch_size": 2, **(changes or {})}
        processes = job.pop("processes", 1 if engine == "single" else 2)
        if processes == 2:
            settings["per_device_train_batch_size"] = 1
        if engine.startswith("zero"):
            settings["deepspeed"] = deepspeed_config(folder / f"{engine}.json", int(engine[-1]))
        if engine == "fsdp2":
            job["env"] = FSDP2
        recipe = folder / f"{output.name}.yaml"
        recipe.write_text(json.dumps(settings))
        log = folder / f"{output.name}.log"
        for old in folder.glob(f"{log.name}.*"):
            old.unlink()
        job |= {"arguments": [str(recipe), *arguments], "processes": processes, "log": str(log), "output": str(output)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self.process.stdout.readline())
        return codes, "".join((folder / f"{log.name}.{rank}").read_text() for rank in range(processes))

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.errors.close()


servers, runs = [], {}  # shared with tests/test_preemption.py, which imports the fixtures


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    if not servers:
        servers.append(Server(tmp_path_factory.mktemp("server")))
        atexit.register(servers[0].close)
    return servers[0]


@pytest.fixture(scope="session")
def unbroken(server, tmp_path_factory):
    """One run from start to finish for each engine: its folder, and how many file events each process had."""

    def get(engine):
        skip_without_deepspeed(engine)
        if engine not in runs:
            output = tmp_path_factory.mktemp(engine) / "run"
            codes, shown = server.run(output, engine=engine)
            assert set(codes) == {0}, shown[-4000:]
            events = [int(Path(f"{output}.log.{rank}.events").read_text()) for rank in range(len(codes))]
            runs[engine] = output, events
        return runs[engine]

    return get


def rows(run):
    """metrics.jsonl without the summary of the last start and without what a clock decides."""
    entries = [e for e in read_jsonl(run / "metrics.jsonl") if "train_runtime" not in e]
    return [{k: v for k, v in e.items() if not any(word in k for word in CLOCK)} for e in entries]


def assert_same_run(run, whole):
    got, expected = load_file(run / "model.safetensors"), load_file(whole / "model.safetensors")
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    assert rows(run) == rows(whole)
    assert not [p.name for p in run.iterdir() if p.name.startswith(".") or "partial" in p.name]
    assert sorted(p.name for p in run.glob("checkpoint-*")) == sorted(p.name for p in whole.glob("checkpoint-*"))


def kill_points(engine, unbroken, count):
    """Half of them between steps, half at a file operation, with the file written last cut to half in every second of those."""
    seed = int(os.environ.get("MATRIX_LLM_KILL_SEED", random.SystemRandom().randrange(10**6)))
    chance, events = random.Random(seed), unbroken(engine)[1]
    points = []
    for index in range(count):
        rank = chance.randrange(len(events))
        point = {"rank": rank, "step": chance.randint(1, RECIPE["max_steps"])}
        if index % 2:
            point = {"rank": rank, "event": chance.randint(1, events[rank]), "tear": index % 4 == 1}
        points.append(point)
    print(f"MATRIX_LLM_KILL_SEED={seed}: {points}")  # shown when the test fails
    return points


def kill_and_resume(server, engine, whole, output, point):
    codes, shown = server.run(output, engine=engine, kill=point)
    assert codes[point["rank"]] == -9, (point, codes, shown[-4000:])
    if (output / "results.json").is_file() and not (output / "results.partial.json").is_file():
        return assert_same_run(output, whole)  # a process died after everything had been written
    codes, shown = server.run(output, "--resume_from_checkpoint", "true", engine=engine)
    assert set(codes) == {0}, (point, shown[-4000:])
    return assert_same_run(output, whole)


# ------------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["single", "zero2"])
def test_three_kills_and_resumptions_end_bit_for_bit_like_an_unbroken_run(engine, server, unbroken, tmp_path):
    """Between two steps, while a checkpoint is written, and while the final files are moved into place."""
    whole, events = unbroken(engine)
    first, second = kill_points(engine, unbroken, 2)
    for index, point in enumerate([first, second, {"rank": 0, "event": events[0] - 2}]):
        kill_and_resume(server, engine, whole, tmp_path / f"run{index}", point)


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["single", "zero2", "zero3", "fsdp2"])
def test_twenty_kills_and_resumptions_end_bit_for_bit_like_an_unbroken_run(engine, server, unbroken, tmp_path, request):
    if "nightly" not in request.config.option.markexpr and not os.environ.get("MATRIX_LLM_NIGHTLY"):
        pytest.skip("takes minutes: run it with `pytest -m nightly` or MATRIX_LLM_NIGHTLY=1")
    whole, _ = unbroken(engine)
    for index, point in enumerate(kill_points(engine, unbroken, 20)):
        kill_and_resume(server, engine, whole, tmp_path / f"run{index}", point)
        shutil.rmtree(tmp_path / f"run{index}")


@pytest.mark.slow
def test_a_run_killed_twice_ends_bit_for_bit_like_an_unbroken_run(server, unbroken, tmp_path):
    whole, _ = unbroken("single")
    run = tmp_path / "run"
    assert server.run(run, kill={"rank": 0, "step": 4})[0] == [-9]
    kill = {"rank": 0, "step": 7}
    assert server.run(run, "--resume_from_checkpoint", "true", kill=kill)[0] == [-9]
    assert server.run(run, "--resume_from_checkpoint", "true")[0] == [0]
    assert_same_run(run, whole)


@pytest.mark.slow
def test_a_kill_between_the_last_checkpoint_and_the_removal_of_an_older_one_leaves_none_too_many(
    server, unbroken, tmp_path
):
    """Of its steps none is left to train, so no later save removes it."""
    run = tmp_path / "run"
    kill_and_resume(server, "single", unbroken("single")[0], run, {"rank": 0, "moving": "checkpoint-4"})


# ------------------------------------------------------------------------------------------------------------ whole or not


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["single", "zero2"])
def test_a_checkpoint_with_any_file_cut_short_or_missing_is_passed_over(engine, unbroken, tmp_path):
    whole, _ = unbroken(engine)
    run = tmp_path / "run"
    for name in ("checkpoint-6", "checkpoint-8"):
        shutil.copytree(whole / name, run / name)
    newest = run / "checkpoint-8"
    assert last_complete_checkpoint(run) == newest
    files = [p for p in newest.rglob("*") if p.is_file()]
    assert {"model.safetensors", "trainer_state.json", MANIFEST} < {p.name for p in files}
    assert [p for p in files if p.name.startswith("optimizer.pt") or p.name.endswith("optim_states.pt")]
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        assert last_complete_checkpoint(run).name == "checkpoint-6", file.name
        file.unlink()
        assert last_complete_checkpoint(run).name == "checkpoint-6", file.name
        file.write_bytes(content)
    assert last_complete_checkpoint(run) == newest


def fake(run, step, torn=False):
    staged = run / "staged"
    staged.mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(b"x" * 10)
    finish_checkpoint(staged, run / f"checkpoint-{step}", processes=1)
    if torn:
        (run / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"x" * 9)


def names(run):
    return sorted(p.name for p in run.iterdir())


def test_save_total_limit_counts_whole_checkpoints_and_keeps_the_last_one(tmp_path):
    for step, torn in [(2, False), (4, False), (6, True), (8, True)]:
        fake(tmp_path, step, torn)
    remove_old_checkpoints(tmp_path, 1, best=None)
    assert names(tmp_path) == [
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-8",
    ]  # newer ones that are not whole are left for a look
    fake(tmp_path, 10)
    remove_old_checkpoints(tmp_path, 1, best=None)
    assert names(tmp_path) == ["checkpoint-10"]


def test_save_total_limit_keeps_the_best_checkpoint(tmp_path):
    for step in (9, 10, 11):
        fake(tmp_path, step)
    remove_old_checkpoints(tmp_path, 2, best=str(tmp_path / "checkpoint-9"))
    assert names(tmp_path) == ["checkpoint-11", "checkpoint-9"]


def test_a_checkpoint_written_again_replaces_the_one_that_is_not_whole(tmp_path):
    fake(tmp_path, 2, torn=True)
    assert "9 bytes of 10" in what_is_missing(tmp_path / "checkpoint-2")
    fake(tmp_path, 2)
    assert what_is_missing(tmp_path / "checkpoint-2") is None
    assert names(tmp_path) == ["checkpoint-2"]


def test_check_names_each_checkpoint_and_what_it_lacks(tmp_path, capsys):
    fake(tmp_path, 2)
    fake(tmp_path, 10, torn=True)
    assert checkpoints_main(["check", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("checkpoint-2: whole")
    assert lines[1].endswith("checkpoint-10: NOT whole, model.safetensors has 9 bytes of 10")


# ---------------------------------------------------------------------------------------------------------------- the disk


def assert_one_line(shown, *words):
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, shown[-4000:]
    assert "Traceback" not in shown, shown[-4000:]
    for word in words:
        assert word in errors[0], errors[0]


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_stops_with_one_line_and_the_last_one_whole(server, unbroken, tmp_path):
    """A limit on file sizes: the optimizer's file fails while it is written, as on a full disk. Lifted, the run goes on."""
    whole, _ = unbroken("single")
    run = tmp_path / "run"
    size = (whole / "checkpoint-6" / "optimizer.pt").stat().st_size
    codes, shown = server.run(run, limit={"step": 5, "bytes": size - 1000})
    assert codes == [1]
    assert_one_line(
        shown, "checkpoint-6 could not be written", "checkpoint-4 is whole", "--resume_from_checkpoint true"
    )
    assert last_complete_checkpoint(run).name == "checkpoint-4"
    assert not (run / ".saving-checkpoint").exists()
    assert server.run(run, "--resume_from_checkpoint", "true")[0] == [0]
    assert_same_run(run, whole)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(options):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("a tmpfs cannot be mounted here (it needs root)")
        mounted.append(folder)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_with_one_line_and_the_last_checkpoint_whole(server, unbroken, small_disk):
    whole, _ = unbroken("single")
    size = sum(p.stat().st_size for p in (whole / "checkpoint-6").rglob("*") if p.is_file())
    disk = small_disk(f"size={size * 7 // 4 // 1024}k")
    codes, shown = server.run(disk / "run")
    assert codes == [1]
    assert_one_line(shown, "checkpoint-4 could not be written", "checkpoint-2 is whole")
    assert last_complete_checkpoint(disk / "run").name == "checkpoint-2"
    assert server.run(disk / "run", "--resume_from_checkpoint", "true")[0] == [1]  # still full, and still whole
    assert last_complete_checkpoint(disk / "run").name == "checkpoint-2"


def test_a_read_only_folder_is_found_before_anything_is_loaded(small_disk, tmp_path, capsys, monkeypatch):
    from matrix_llm import train
    from matrix_llm.run import prepare

    if os.geteuid() == 0:  # whom permissions do not stop
        folder = small_disk("ro")
    else:
        folder = tmp_path / "disk"
        folder.chmod(0o555)
    monkeypatch.setattr(prepare, "prepare_data", lambda *a, **k: pytest.fail("data was loaded"))
    (tmp_path / "r.yaml").write_text(json.dumps({**RECIPE, "output_dir": str(folder / "run")}))
    assert train.main([str(tmp_path / "r.yaml")]) == 2
    assert_one_line(capsys.readouterr().err, "output_dir=", "cannot be written", "choose another output_dir")


# -------------------------------------------------------------------------------------------------------------- resumption


@pytest.mark.slow
def test_resuming_with_other_settings_processes_or_half_a_checkpoint_is_refused_by_name(server, unbroken, tmp_path):
    run = tmp_path / "run"
    assert server.run(run, kill={"rank": 0, "step": 6})[0] == [-9]
    codes, shown = server.run(run, "--resume_from_checkpoint", "true", "--learning_rate", "0.5", "--seed", "7")
    assert codes == [2]
    assert_one_line(shown, "learning_rate: 0.001 then, 0.5 now", "seed: 'not given' then, 7 now", "Restore them")
    codes, shown = server.run(run, "--resume_from_checkpoint", "true", processes=2)
    assert codes == [2, 2]
    assert_one_line(shown, "with 2 processes: it was made with 1", "Launch as many")
    os.truncate(run / "checkpoint-4" / "optimizer.pt", 1000)
    codes, shown = server.run(run, "--resume_from_checkpoint", str(run / "checkpoint-4"))
    assert codes == [2]
    assert_one_line(shown, "checkpoint-4", "not whole: optimizer.pt has 1,000 bytes", "Give true")
    codes, shown = server.run(run, "--resume_from_checkpoint", "true")  # goes on from checkpoint-2
    assert codes == [0]
    assert_same_run(run, unbroken("single")[0])


# ----------------------------------------------------------------------------------------------------------- consolidation


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "tied"), [("zero2", False), ("zero3", False), ("zero3", True), ("fsdp2", False), ("fsdp2", True)]
)
def test_sharded_checkpoints_consolidate_to_the_trained_weights_exactly(engine, tied, server, tmp_path, capsys):
    """A run whose last checkpoint holds the weights that it also saved at its end."""
    skip_without_deepspeed(engine)
    run = tmp_path / "run"
    model = {**RECIPE["model_config"], "tie_word_embeddings": tied}
    codes, shown = server.run(
        run, engine=engine, changes={"max_steps": 2, "eval_strategy": "no", "model_config": model}
    )
    assert set(codes) == {0}, shown[-4000:]
    out = tmp_path / "plain"
    assert checkpoints_main(["consolidate", str(run / "checkpoint-2"), str(out)]) == 0, capsys.readouterr().err
    model, expected = AutoModelForCausalLM.from_pretrained(out), load_file(run / "model.safetensors")
    assert len(AutoTokenizer.from_pretrained(out)) == 300
    state = model.state_dict()
    assert set(expected) <= set(state)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    assert not [p for p in out.rglob("*") if p.suffix in (".pt", ".bin", ".pth") or p.name == "trainer_state.json"]

    assert checkpoints_main(["consolidate", str(run / "checkpoint-2"), str(out)]) == 2  # never over anything
    assert "not an empty folder" in capsys.readouterr().err
    refuses_a_pickle_that_runs_code(run / "checkpoint-2", tmp_path, capsys)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refuses_a_pickle_that_runs_code(checkpoint, tmp_path, capsys):
    poisoned, ran = tmp_path / "poisoned", tmp_path / "ran"
    shutil.copytree(checkpoint, poisoned)
    index = poisoned / "pytorch_model_fsdp_0" / ".metadata"
    if index.is_file():
        index.write_bytes(pickle.dumps(Bomb(ran)))
    else:
        for file in poisoned.rglob("*_states.pt"):
            torch.save(Bomb(ran), file)
            assert zipfile.is_zipfile(file)
    manifest = json.loads((poisoned / MANIFEST).read_text())
    manifest["files"] = {name: (poisoned / name).stat().st_size for name in manifest["files"]}
    (poisoned / MANIFEST).write_text(json.dumps(manifest))
    assert checkpoints_main(["consolidate", str(poisoned), str(tmp_path / "never")]) == 2
    assert "could not be read" in capsys.readouterr().err
    assert not ran.exists()
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_consolidating_what_has_no_shards_says_so(unbroken, tmp_path, capsys):
    checkpoint = unbroken("single")[0] / "checkpoint-8"
    assert checkpoints_main(["consolidate", str(checkpoint), str(tmp_path / "out")]) == 2
    assert "from_pretrained reads it as it is" in capsys.readouterr().err

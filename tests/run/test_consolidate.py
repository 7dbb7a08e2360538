"""Sharded checkpoints become plain weights, exactly, and no file of a checkpoint can run code on the way."""

import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from matrix_llm.checkpoints import MANIFEST, main
from tests.support.engines import skip_without_deepspeed
from tests.support.killed_runs import RECIPE


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
    assert main(["consolidate", str(run / "checkpoint-2"), str(out)]) == 0, capsys.readouterr().err
    model, expected = AutoModelForCausalLM.from_pretrained(out), load_file(run / "model.safetensors")
    assert len(AutoTokenizer.from_pretrained(out)) == 300
    state = model.state_dict()
    assert set(expected) <= set(state)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    assert not [p for p in out.rglob("*") if p.suffix in (".pt", ".bin", ".pth") or p.name == "trainer_state.json"]

    assert main(["consolidate", str(run / "checkpoint-2"), str(out)]) == 2  # never over anything
    assert "not an empty folder" in capsys.readouterr().err
    assert_refuses_a_pickle_that_runs_code(run / "checkpoint-2", tmp_path, capsys)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def assert_refuses_a_pickle_that_runs_code(checkpoint, tmp_path, capsys):
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
    assert main(["consolidate", str(poisoned), str(tmp_path / "never")]) == 2
    assert "could not be read" in capsys.readouterr().err
    assert not ran.exists()
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_consolidating_what_has_no_shards_says_so(unbroken, tmp_path, capsys):
    checkpoint = unbroken("single")[0] / "checkpoint-8"
    assert main(["consolidate", str(checkpoint), str(tmp_path / "out")]) == 2
    assert "from_pretrained" in capsys.readouterr().err

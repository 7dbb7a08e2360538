"""No pickle of a checkpoint runs code, and no name in it leads out of its folder, whoever wrote the checkpoint."""

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from matrix_llm.base.errors import CheckpointError
from matrix_llm.checkpoints import finish_checkpoint, main
from matrix_llm.run.pickles import check_indexes, tensors_only
from tests.support.tiny import train

WEIGHTS = {"layer.weight": torch.arange(6.0).reshape(2, 3), "lm_head.weight": torch.ones(3, 2)}


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def fsdp_checkpoint(tmp_path):
    """Makes a complete checkpoint in FSDP2's form, of the given state."""

    def make(state, change=None):
        staged = tmp_path / "staged"
        shards = staged / "pytorch_model_fsdp_0"
        shards.mkdir(parents=True)
        dcp.save({"model": state}, checkpoint_id=str(shards), no_dist=True)
        (staged / "config.json").write_text("{}")
        if change is not None:
            change(staged)
        finish_checkpoint(staged, tmp_path / "checkpoint-2", processes=1)
        return tmp_path / "checkpoint-2"

    return make


def consolidate(checkpoint, capsys):
    """Exit status and the line of error; a refused checkpoint leaves nothing behind."""
    out = checkpoint.parent / "plain"
    status = main(["consolidate", str(checkpoint), str(out)])
    error = capsys.readouterr().err
    if status:
        assert not out.exists()
        assert error.count("\n") == 1
    return status, error


def change_index(shards, change):
    index = pickle.loads((shards / ".metadata").read_bytes())
    change(index)
    (shards / ".metadata").write_bytes(pickle.dumps(index))


def test_an_honest_one_is_consolidated(fsdp_checkpoint, capsys):
    checkpoint = fsdp_checkpoint(WEIGHTS)
    assert consolidate(checkpoint, capsys)[0] == 0
    found = load_file(checkpoint.parent / "plain" / "model.safetensors")
    assert {name: value.tolist() for name, value in found.items()} == {k: v.tolist() for k, v in WEIGHTS.items()}


@pytest.mark.parametrize("name", ["extra", "layer.weight", "nested"])
def test_an_entry_that_is_not_a_tensor_is_refused_and_does_not_run(name, fsdp_checkpoint, tmp_path, capsys):
    bomb = {"deeper": Bomb(tmp_path / "ran")} if name == "nested" else Bomb(tmp_path / "ran")
    checkpoint = fsdp_checkpoint({**WEIGHTS, name: bomb})
    status, error = consolidate(checkpoint, capsys)
    assert status == 2
    assert "not a tensor" in error
    assert name in error
    assert not (tmp_path / "ran").exists()


def test_the_engines_own_loaders_run_nothing_either(fsdp_checkpoint, tmp_path):
    """As a resumed run calls them: they ask torch for weights_only=False."""
    checkpoint = fsdp_checkpoint({**WEIGHTS, "extra": Bomb(tmp_path / "ran")})
    state = {"model": {**WEIGHTS, "extra": None}}
    with tensors_only(), pytest.raises(BaseException, match=r"weights_only|Weights only"):
        dcp.load(state, checkpoint_id=str(checkpoint / "pytorch_model_fsdp_0"), no_dist=True)
    assert not (tmp_path / "ran").exists()
    file = tmp_path / "file.pt"
    torch.save(Bomb(tmp_path / "ran"), file)
    with tensors_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=False)
    assert not (tmp_path / "ran").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("place", ["pytorch_model_fsdp_0", "optimizer_0", "deeper/optimizer_1"])
def test_no_index_that_names_code_is_read(place, tmp_path):
    folder = tmp_path / "checkpoint-1" / place
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"mkdir.*does not belong"):
        check_indexes(tmp_path / "checkpoint-1")
    assert not (tmp_path / "ran").exists()


def test_a_run_that_resumes_checks_the_index_first(tmp_path, tiny_tokenizer):
    folder = tmp_path / "checkpoint-1" / "optimizer_0"
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    trainer = train(tmp_path / "run", tiny_tokenizer, max_steps=1)
    with pytest.raises(CheckpointError, match=r"mkdir.*does not belong"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/../../secret"])
def test_an_index_that_names_a_file_outside_is_refused(name, fsdp_checkpoint, capsys):
    def point_outside(staged):
        shards = staged / "pytorch_model_fsdp_0"
        (shards / "sub").mkdir()

        def change(index):
            for entry in index.storage_data.values():
                entry.relative_path = name

        change_index(shards, change)

    status, error = consolidate(fsdp_checkpoint(WEIGHTS, point_outside), capsys)
    assert status == 2
    assert name in error
    assert "outside" in error


def test_an_index_that_claims_more_than_is_there_is_refused(fsdp_checkpoint, capsys):
    def claim(staged):
        def change(index):
            index.state_dict_metadata["model.layer.weight"].size = torch.Size([10**7, 10**7])

        change_index(staged / "pytorch_model_fsdp_0", change)

    status, error = consolidate(fsdp_checkpoint(WEIGHTS, claim), capsys)
    assert status == 2
    assert "bytes of weights" in error


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], {}, {1: torch.ones(2)}, None], ids=str)
def test_a_file_that_does_not_hold_weights_is_one_line(content, tmp_path, capsys):
    staged = tmp_path / "staged"
    staged.mkdir()
    torch.save(content, staged / "pytorch_model_fsdp.bin")
    finish_checkpoint(staged, tmp_path / "checkpoint-2", processes=1)
    status, error = consolidate(tmp_path / "checkpoint-2", capsys)
    assert status == 2
    assert "Give another checkpoint" in error


@pytest.mark.parametrize("target", ["absolute", "relative", "chain"])
def test_files_that_link_out_of_the_checkpoint_are_not_copied(target, fsdp_checkpoint, tmp_path, capsys):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")

    def link(staged):
        middle = tmp_path / "middle.txt"
        middle.symlink_to(secret)
        targets = {"absolute": secret, "relative": Path("../secret.txt"), "chain": middle}
        (staged / "notes.txt").symlink_to(targets[target])

    status, error = consolidate(fsdp_checkpoint(WEIGHTS, link), capsys)
    assert status == 2
    assert "outside the checkpoint" in error


class Attribute:
    """Pickled as getattr(owner, name), as Python 3.11.0 to 3.11.3 pickles a member of an enumeration."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


@pytest.mark.parametrize(
    ("owner", "name", "is_read"),
    [(_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST", True), (_MEM_FORMAT_ENCODING, "mro", False), (Path, "home", False)],
)
def test_an_index_may_name_a_member_of_an_enumeration_as_old_pythons_do_and_no_other_attribute(
    fsdp_checkpoint, owner, name, is_read
):
    checkpoint = fsdp_checkpoint(WEIGHTS)
    change_index(
        checkpoint / "pytorch_model_fsdp_0", lambda index: setattr(index, "planner_data", Attribute(owner, name))
    )
    if is_read:
        check_indexes(checkpoint)
        return
    with pytest.raises(CheckpointError, match=name):
        check_indexes(checkpoint)


def test_the_same_holds_for_the_files_of_zero(tmp_path):
    stages = pytest.importorskip("deepspeed.runtime.zero.config", reason="deepspeed is not installed").ZeroStageEnum
    torch.save({"stage": Attribute(stages, "weights")}, tmp_path / "state.pt")
    torch.save({"stage": Attribute(torch.Tensor, "apply_")}, tmp_path / "foreign.pt")
    with tensors_only():
        assert torch.load(tmp_path / "state.pt", weights_only=False)["stage"] is stages.weights
        with pytest.raises(pickle.UnpicklingError, match="apply_"):
            torch.load(tmp_path / "foreign.pt", weights_only=False)

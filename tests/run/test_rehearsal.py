"""What could not be saved after training is found before its first step."""

import errno
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from matrix_llm import train
from matrix_llm.base.errors import RecipeError
from matrix_llm.config import MatrixConfig
from matrix_llm.run.rehearsal import describe_space, rehearse_saving
from matrix_llm.trainer import MatrixTrainer
from tests.support.checkpoints import save_llama
from tests.support.killed_runs import assert_one_line
from tests.support.tiny import TINY, config, rows, tiny_model


@pytest.fixture
def arguments(tmp_path):
    def make(**changes):
        return MatrixConfig(**config(tmp_path / "run", **changes))

    return make


def test_what_could_not_be_saved_stops_the_run_before_its_first_step(tmp_path, tiny_tokenizer, capsys, monkeypatch):
    """On the command line, and in a trainer that will save checkpoints."""
    from transformers import PreTrainedTokenizerBase

    base = save_llama(tmp_path / "base", rows=300, max_position_embeddings=256)
    tiny_tokenizer.save_pretrained(base)
    original = PreTrainedTokenizerBase.save_pretrained

    def broken(self, folder, **options):
        if "tokens" in str(folder) or "matrix_llm" in str(folder):  # the cache's key
            return original(self, folder, **options)
        raise KeyError("sp_model")

    recipe = {key: value for key, value in TINY.items() if key not in ("model_config", "tokenizer_vocab_size")}
    recipe |= {"model_name_or_path": base, "output_dir": str(tmp_path / "run")}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    monkeypatch.setattr(MatrixTrainer, "training_step", lambda *_, **__: pytest.fail("a step was trained"))
    monkeypatch.setattr("matrix_llm.data.cache.tokenizer_key", lambda _: "key")
    monkeypatch.setattr("matrix_llm.data.rowset.tokenizer_key", lambda _: "key")
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", broken)
    assert train.main([str(tmp_path / "r.yaml")]) == 2
    assert_one_line(capsys.readouterr().err, "the tokenizer of ", "could not be saved after training: 'sp_model'")
    assert not (tmp_path / "run").exists()

    options = MatrixConfig(**config(tmp_path / "other", save_strategy="steps"))
    trainer = MatrixTrainer(tiny_model(), options, train_dataset=rows(), processing_class=tiny_tokenizer)
    with pytest.raises(RecipeError, match="the tokenizer"):
        trainer.train()


class NeedsItsWeights(LlamaForCausalLM):
    def save_pretrained(self, save_directory, state_dict=None, **options):
        state_dict = self.state_dict() if state_dict is None else state_dict
        assert len(state_dict["lm_head.weight"])
        super().save_pretrained(save_directory, state_dict=state_dict)


def needs_its_weights():
    model = NeedsItsWeights(tiny_model().config)
    model.load_state_dict(tiny_model().state_dict())
    return model


def with_own_adapter():
    model = tiny_model()
    try:
        model.add_adapter(LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    except ValueError as error:  # transformers 5.24 asks for a PEFT that is not released
        pytest.skip(str(error))
    return model


@pytest.mark.parametrize("make", [needs_its_weights, with_own_adapter])
def test_what_sft_trainer_saves_passes(make, tmp_path, tiny_tokenizer):
    """Whatever save_pretrained asks of the weights, which the rehearsal has none of."""
    trainers = []
    for class_, settings in ((MatrixTrainer, MatrixConfig), (SFTTrainer, SFTConfig)):
        options = config(tmp_path / class_.__name__, max_steps=1, save_strategy="steps")
        own = {"mce_weight": 0.0} if settings is MatrixConfig else {}
        del options["mce_steps"]
        trainers.append(
            class_(make(), settings(**options, **own), train_dataset=rows(), processing_class=tiny_tokenizer)
        )
        trainers[-1].train()
    ours, theirs = (sorted(p.name for p in Path(t.args.output_dir, "checkpoint-1").iterdir()) for t in trainers)
    assert set(theirs) <= set(ours)


def test_without_a_temporary_folder_a_recipe_stops_and_a_trainer_goes_on(
    tmp_path, tiny_tokenizer, arguments, monkeypatch, caplog
):
    options = arguments(save_strategy="steps", mce_weight=0.0, max_steps=1)
    trainer = MatrixTrainer(tiny_model(), options, train_dataset=rows(), processing_class=tiny_tokenizer)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(RecipeError, match=r"missing cannot be written: No such file.*TMPDIR"):
        trainer.rehearse_saving()
    trainer.train()
    assert "Whether checkpoints can be saved was not tried" in caplog.text
    assert "transformers 4.57 may read it differently" in caplog.text  # what needs the folder after saving
    assert Path(options.output_dir, "checkpoint-1", "model.safetensors").is_file()


def test_a_temporary_folder_without_room_is_named(tiny_tokenizer, arguments, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RecipeError, match=f"{tempfile.gettempdir()} cannot be written: No space.*TMPDIR"):
        rehearse_saving(tiny_model(), tiny_tokenizer, arguments())


def test_a_trainer_does_not_mind_what_only_reading_changes(tiny_tokenizer, arguments, monkeypatch):
    """SFTTrainer would train and save. A recipe is refused."""
    options = arguments(save_strategy="steps", mce_weight=0.0, max_steps=1)
    trainer = MatrixTrainer(tiny_model(), options, train_dataset=rows(), processing_class=tiny_tokenizer)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda folder, **_: type("Other", (), {"vocab_size": 7})())
    with pytest.raises(RecipeError, match="vocab_size"):
        trainer.rehearse_saving()
    trainer.train()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_model_that_can_be_saved_passes_and_leaves_nothing_behind(name, tmp_path, tiny_tokenizer, arguments, capfd):
    rehearse_saving(tiny_model(name), tiny_tokenizer, arguments())
    assert not (tmp_path / "run").exists()
    assert "Writing model shards" not in capfd.readouterr().err


def test_an_adapter_with_a_module_trained_in_full_passes(tiny_tokenizer, arguments):
    adapted = get_peft_model(tiny_model(), LoraConfig(modules_to_save=["lm_head"], task_type="CAUSAL_LM"))
    rehearse_saving(adapted, tiny_tokenizer, arguments())


def test_generation_settings_and_a_tokenizer_that_would_not_survive_are_named(tiny_tokenizer, arguments, monkeypatch):
    model = tiny_model()
    model.generation_config.temperature = 0.5
    with pytest.raises(RecipeError, match=r"generation settings of .*could not be saved.*do_sample"):
        rehearse_saving(model, None, arguments())

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda folder, **_: type("Other", (), {"vocab_size": 7})())
    with pytest.raises(RecipeError, match="vocab_size is 300 before it is saved and 7"):
        rehearse_saving(tiny_model(), tiny_tokenizer, arguments())


def test_a_disk_with_too_little_room_is_named_with_figures(arguments, monkeypatch):
    model = tiny_model()
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4
    checkpoint = 3 * weights
    for changes, needed in (
        ({"save_strategy": "no"}, weights),
        ({"save_strategy": "steps", "save_total_limit": 2}, weights + 3 * checkpoint),
    ):
        for free, warned in ((needed, False), (needed - 1, True)):
            usage = shutil.disk_usage("/")._replace(free=free)
            monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
            found = describe_space(model, arguments(**changes))
            assert (found is not None) == warned
            monkeypatch.undo()
    assert "GiB free" in found
    assert "3 checkpoints" in found

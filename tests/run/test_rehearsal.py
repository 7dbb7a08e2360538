"""What could not be saved after training is found before its first step."""

import json
import shutil

import pytest

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


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_model_that_can_be_saved_passes_and_leaves_nothing_behind(name, tmp_path, tiny_tokenizer, arguments, capfd):
    rehearse_saving(tiny_model(name), tiny_tokenizer, arguments())
    assert not (tmp_path / "run").exists()
    assert "Writing model shards" not in capfd.readouterr().err


def test_an_adapter_with_a_module_trained_in_full_passes(tiny_tokenizer, arguments):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_model(), LoraConfig(modules_to_save=["lm_head"], task_type="CAUSAL_LM"))
    rehearse_saving(adapted, tiny_tokenizer, arguments())


def test_generation_settings_and_a_tokenizer_that_would_not_survive_are_named(tiny_tokenizer, arguments, monkeypatch):
    model = tiny_model()
    model.generation_config.temperature = 0.5
    with pytest.raises(RecipeError, match=r"generation settings of .*could not be saved.*do_sample"):
        rehearse_saving(model, None, arguments())

    from transformers import AutoTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda folder: type("Other", (), {"vocab_size": 7})())
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

"""What users' own scripts did with the code before it was split into rooms, and must be able to do still."""

import math

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser
from trl import TrlParser

from matrix_llm.config import DataArguments, MatrixConfig, ModelArguments, RecipeError, load_recipe
from matrix_llm.ssl.metrics import batch_effective_rank, batch_matrix_entropy


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_the_settings_are_arguments_of_the_parsers_that_trl_scripts_use(parser):
    arguments = ["--output_dir", "x", "--use_cpu", "true", "--bf16", "false", "--model_name_or_path", "gpt2"]
    arguments += ["--dataset", "builtin", "--lora_r", "4", "--mce_weight", "0.5", "--mce_solver", "taylor"]
    model, data, training = parser((ModelArguments, DataArguments, MatrixConfig)).parse_args_into_dataclasses(arguments)
    assert (model.lora_r, data.dataset) == (4, "builtin")
    assert (training.mce_weight, training.mce_solver) == (0.5, "taylor")


def test_those_parsers_refuse_a_solver_that_does_not_exist(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(MatrixConfig).parse_args_into_dataclasses(["--output_dir", "x", "--mce_solver", "lanczos"])
    assert "krylov" in capsys.readouterr().err


@pytest.mark.parametrize("setting", [{"mce_weight": np.float64(0.5)}, {"mce_weight": np.float32(0.5)}])
def test_numpy_numbers_are_settings_too(setting):
    config = MatrixConfig(output_dir="x", use_cpu=True, bf16=False, **setting)
    assert type(config.mce_weight) is float
    assert config.mce_weight == 0.5


def test_numpy_integers_are_settings_too():
    assert MatrixConfig(output_dir="x", use_cpu=True, bf16=False, mce_steps=np.int64(4)).mce_steps == 4


def test_the_matrix_entropy_of_a_batch_is_one_more_than_the_log_of_its_effective_rank():
    z = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = math.log(batch_effective_rank(z, center=False)) + 1
    assert batch_matrix_entropy(z) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("center", [False, True])
def test_the_matrix_entropy_of_a_batch_is_that_of_the_eigenvalues_in_numpy(center):
    z = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True)
    rows = rows - rows.mean(0) if center else rows
    w = np.linalg.eigvalsh(rows.T @ rows / 20)
    assert batch_matrix_entropy(z, center=center) == pytest.approx(-(w * np.log(w)).sum() + w.sum(), rel=1e-9)


@pytest.mark.parametrize("value", ["[a]", "{a: 1}"])
def test_a_list_or_a_mapping_in_place_of_a_choice_is_refused_by_name(tmp_path, value):
    """transformers gives log_level's choices as the keys of a dictionary, which cannot look up a list."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"dataset: builtin\nlog_level: {value}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"line 2: log_level=.*debug"):
        load_recipe(recipe)

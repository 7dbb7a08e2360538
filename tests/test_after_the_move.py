"""What users' own scripts did with the code before it was split into rooms, and must be able to do still."""

import numpy as np
import pytest
from transformers import HfArgumentParser
from trl import TrlParser

from matrix_llm.config import DataArguments, MatrixConfig, ModelArguments


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

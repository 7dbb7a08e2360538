"""The loss settings and their defaults (loss/settings.py), the size of a chunk and the trained positions."""

import doctest

import pytest
import torch

from matrix_llm.base.errors import DataError, RecipeError
from matrix_llm.config import MatrixConfig
from matrix_llm.loss import chunks, positions, settings
from matrix_llm.loss.chunks import CHUNK_BYTES, positions_per_chunk
from matrix_llm.loss.positions import TrainedPositions
from matrix_llm.loss.settings import LossSettings, Solver


@pytest.mark.parametrize("module", [chunks, positions, settings])
def test_doctests(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize(
    ("given", "vocabulary_size", "steps", "top_k"),
    [
        ({}, 1024, 6, None),  # nothing to save
        ({}, 1025, 6, 16),
        ({"top_k": 8, "steps": 3}, 32016, 3, 8),
        ({"top_k": 8}, 8, 6, None),  # all tokens
        ({"sketch_dim": 64}, 32016, 6, None),
        ({"embedding_grad": True}, 32016, 6, None),  # the tail's vectors would count as constants
        ({"solver": "exact"}, 32016, 6, None),
        ({"solver": "taylor"}, 32016, 6, None),
    ],
)
def test_the_defaults_depend_on_vocabulary_solver_sketch_and_trained_embeddings(given, vocabulary_size, steps, top_k):
    solver = LossSettings(**given).solver_for(vocabulary_size)
    assert (solver.steps, solver.top_k) == (steps, top_k)


def test_whether_top_k_is_chosen_can_be_said_by_the_caller():
    assert LossSettings().solver_for(5000, choose_top_k=False).top_k is None
    assert LossSettings(embedding_grad=True).solver_for(5000, choose_top_k=True).top_k == 16


def test_every_setting_of_a_recipe_arrives(tmp_path):
    args = MatrixConfig(
        str(tmp_path), use_cpu=True, bf16=False, mce_weight=0.25, mce_solver="taylor", mce_steps=7, mce_order=5,
        mce_sketch_dim=9, mce_top_k=None, mce_embeddings="input", mce_embedding_grad=True,
    )  # fmt: skip
    assert LossSettings.from_config(args) == LossSettings(0.25, "taylor", 7, 5, 9, None, "input", True)
    args.mce_solver, args.mce_top_k = "krylov", 11
    assert LossSettings.from_config(args).solver_for(500) == Solver("krylov", 7, 5, 9, 11)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mce_weight": -1.0}, "mce_weight=-1.0.*at least 0"),
        ({"solver": "lanczos"}, "solver='lanczos'.*'krylov'"),
        ({"order": None}, "order=None.*at least 1"),
        ({"sketch_dim": 0}, "sketch_dim=0.*at least 1"),
        ({"steps": True}, "steps=True.*integer"),
        ({"solver": "exact", "top_k": 4}, "top_k=4.*solver='exact'.*Remove top_k"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(given, said):
    with pytest.raises(RecipeError, match=said):
        LossSettings(**given)


@pytest.mark.parametrize("positions", [1, 7, 1000])
@pytest.mark.parametrize("fitting", [1, 3, 7, 64])
def test_chunks_are_even_and_as_few_as_fit(positions, fitting):
    chunk = positions_per_chunk(positions, CHUNK_BYTES // fitting)
    number = -(-positions // chunk)
    assert chunk <= fitting
    assert number == -(-positions // min(fitting, positions))
    assert chunk * number - positions < number  # none is short by more than one position each


def test_a_larger_budget_makes_larger_chunks():
    assert positions_per_chunk(100, CHUNK_BYTES, least_budget=10 * CHUNK_BYTES) == 10
    assert positions_per_chunk(100, 2 * CHUNK_BYTES) == 1


def test_a_label_outside_the_vocabulary_is_an_error_of_the_data():
    assert TrainedPositions(torch.tensor([-100, 4, 0]), 5).index().tolist() == [1, 2]
    for label in (5, -1):
        with pytest.raises(DataError, match=rf"label {label} at position 1.*vocabulary of 5.*ignore_index"):
            TrainedPositions(torch.tensor([0, label]), 5).index()

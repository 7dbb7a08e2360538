"""benchmarks/data_scale.py, at a hundredth of MetaMathQA's size."""

import json

import datasets
import numpy as np

from benchmarks import data_scale
from matrix_llm.data import rowset


def test_five_thousand_rows_of_metamathqas_shape_are_tokenised_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenised = []
    original = rowset.tokenise
    monkeypatch.setattr(
        rowset, "tokenise", lambda *a, name, **k: tokenised.append(name) or original(*a, name=name, **k)
    )

    path, tests = data_scale.prepare(tmp_path, 5000, [])
    with path.open() as file:
        made = [json.loads(line) for line in file]
    assert list(made[0]) == ["query", "response", "type", "original_question"]
    assert 180 < np.mean([len(row["query"]) for row in made]) < 300
    assert 380 < np.mean([len(row["response"]) for row in made]) < 600
    assert 800 < path.stat().st_size / 5000 < 1000  # 350 MB at 395,000

    def run(phase):
        return data_scale.run_phase(phase, tmp_path, str(path), list(map(str, tests)), None)

    first, second = run("first run"), run("second run")
    assert first["rows_kept"] == second["rows_kept"] > 4800
    leaked = run("leakage check")
    assert leaked["dropped_leaked"] == 5000 // data_scale.PLANTED  # all that were planted, and none of the others
    assert tokenised == ["train"]

"""Matrix information of two views, and the figures of a run."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.image import imread

from matrix_llm.ssl.figures import batch_information, main
from matrix_llm.ssl.pretrain import main as pretrain
from tests.support.tiny_ssl import BACKBONE


def test_equal_views_have_no_divergence_and_a_cross_entropy_equal_to_their_entropy():
    z = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = batch_information(z, z)
    c = torch.nn.functional.normalize(z, dim=1)
    eigenvalues = torch.linalg.eigvalsh(c.T @ c / 20) + 1e-3
    assert found["matrix_kl_views"] == pytest.approx(0.0, abs=1e-9)
    assert found["matrix_cross_entropy_views"] == pytest.approx(
        float(-(eigenvalues * eigenvalues.log()).sum() + eigenvalues.sum())
    )


def test_effective_rank_is_the_width_shrunk_by_the_divergence_from_uniform():
    """Prop. 5.1, at trace 1."""
    z = torch.randn(30, 7, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 8)
    found = batch_information(z, z + 0.1)
    assert found["effective_rank"] == pytest.approx(7 * math.exp(-found["matrix_kl_to_uniform"]))
    assert 1 < found["effective_rank"] < 7


def test_views_further_apart_have_more_divergence():
    g = torch.Generator().manual_seed(2)
    z, noise = torch.randn(64, 4, generator=g) * torch.tensor([3.0, 1, 1, 1]), torch.randn(64, 4, generator=g)
    near, far = (batch_information(z, z + scale * noise)["matrix_kl_views"] for scale in (0.1, 3.0))
    assert 0 < near < far


def test_views_of_different_images_are_refused():
    with pytest.raises(ValueError, match=r"z1 is \(4, 3\) and z2 is \(5, 3\)"):
        batch_information(torch.ones(4, 3), torch.ones(5, 3))


def colours(path: Path) -> set[tuple[int, int, int]]:
    """The saturated colours of at least 10 pixels each: marks and lines, not the axes, the text or the background."""
    pixels = np.rint(255 * imread(path)[..., :3]).astype(int).reshape(-1, 3)
    found, counts = np.unique(pixels[np.ptp(pixels, axis=1) > 60], axis=0, return_counts=True)
    return {tuple(colour) for colour in found[counts >= 10].tolist()}


def test_a_finished_run_gets_its_figures_and_another_folder_is_named(tmp_path, capsys):
    recipe = tmp_path / "tiny.yaml"
    settings = {
        "method": "matrix_ssl",
        "dataset": "digits",
        "eval_dataset": "digits",
        "backbone_config": BACKBONE,
    }
    settings |= {
        "projector_widths": [8, 8],
        "predictor_widths": [4, 8],
        "image_size": 8,
        "channels": 1,
        "max_steps": 4,
        "use_cpu": True,
    }
    settings |= {
        "per_device_train_batch_size": 64,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    recipe.write_text(yaml.safe_dump({**settings, "effective_rank_steps": 2, "logging_steps": 2}))
    run, out = tmp_path / "run", tmp_path / "figures"
    assert pretrain([str(recipe), "--output_dir", str(run)]) == 0
    assert main([str(run), "--data", "digits", "--rows", "60", "--output", str(out)]) == 0
    (found,) = json.loads((out / "information.json").read_text()).values()
    assert found["rows"] == 60
    assert 1 <= found["effective_rank"] <= 8
    assert len(colours(out / "tsne.png")) >= 9  # one for each class of digits; the tenth is grey
    assert len(colours(out / "effective_rank.png")) >= 1
    capsys.readouterr()
    assert main([str(tmp_path), "--data", "digits", "--output", str(out)]) == 2
    assert "not a finished run of pretrain.py" in capsys.readouterr().err

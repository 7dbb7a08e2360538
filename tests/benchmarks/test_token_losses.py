"""benchmarks/lm_head.py --losses: what stands side by side is the same loss, and the table is what the rows say."""

import pytest
import torch

from benchmarks.lm_head.inputs import Shape
from benchmarks.lm_head.loss_inputs import make_loss_inputs
from benchmarks.lm_head.loss_tables import losses_table
from benchmarks.lm_head.losses import GROUPS, implementations
from benchmarks.lm_head.names import CE, OURS, OURS_CE, PRODUCTS


@pytest.mark.parametrize("label", GROUPS)
def test_every_implementation_of_a_group_has_the_same_loss_and_gradients(label):
    inputs = make_loss_inputs(Shape(64, 32, 300, "float32", "cpu"), seed=0)
    results = {}
    for name, loss in implementations(label, "cpu").found.items():
        if loss is None or name == OURS or (name == OURS_CE and label != CE):
            continue
        value = loss(inputs)
        results[name] = (value.detach(), *torch.autograd.grad(value, (inputs.hidden, inputs.weight)))
    expected, *others = results.values()
    assert others
    for each in others:
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-6)


def test_the_table_of_losses_has_times_in_pairs_targets_and_what_could_not_run():
    about = {"name": "tiny", "shape": [4, 4, 9, "float32", "cpu"], "loss": "dft"}
    seconds = {OURS_CE: [1.0, 2.0, 4.0], "matrix_llm, dft": [1.1, 2.4, 4.0], "whole logits": [3.0, 6.0, 12.0]}
    timed = {"kind": "token loss time", **about, "seconds": seconds, "busy_elsewhere": 0.5}
    timed["absent"] = {"Liger, fused": "it needs a GPU"}
    memory = {"kind": "token loss memory", **about, "implementation": "matrix_llm, dft", "extra": 3 * 2**20}
    table = losses_table([timed, memory], "tiny")
    assert "| dft | matrix_llm, dft | 2.4 (1.1 to 4) s | 1.100 | 1.05 | 3 MiB |" in table  # 1.1, 1.2, 1.0
    assert "| dft | whole logits | 6 (3 to 12) s | 3.000 |  | not measured |" in table
    assert "| dft | Liger, fused | it needs a GPU |" in table
    assert "0.50 cores" in table
    assert OURS_CE not in table
    ce = timed | {"loss": CE, "seconds": {OURS_CE: [1.0], PRODUCTS: [0.9]}, "absent": {}}
    assert f"| ce | {OURS_CE} | 1 (1 to 1) s | 1.000 |" in losses_table([ce], "tiny")

"""LARS (training/lars.py) against steps computed by hand."""

import torch

from matrix_llm.ssl.training.lars import LARS


def test_lars_takes_steps_in_proportion_to_each_layer():
    w, b = torch.nn.Parameter(torch.full((2, 2), 2.0)), torch.nn.Parameter(torch.ones(2))
    optimizer = LARS([w, b], lr=0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.01)
    for _ in range(2):
        w.grad, b.grad = torch.ones(2, 2), torch.ones(2)
        optimizer.step()
    # by hand: |w| = 4, g + 0.1 w = 1.2, |.| = 2.4, ratio 0.01 * 4 / 2.4; v = 0.02, w = 1.99; then again with v kept
    # at 0.9
    first = 0.01 * 4 / 2.4 * 1.2
    w1 = 2 - 0.5 * first
    second = 0.9 * first + 0.01 * (2 * w1) / (2 * (1 + 0.1 * w1)) * (1 + 0.1 * w1)
    torch.testing.assert_close(w.detach(), torch.full((2, 2), w1 - 0.5 * second))
    torch.testing.assert_close(b.detach(), torch.full((2,), 1 - 0.5 - 0.5 * 1.9))  # no ratio, no decay

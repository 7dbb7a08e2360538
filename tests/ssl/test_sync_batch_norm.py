"""Batch normalisation over the rows of all ranks (models/sync_batch_norm.py)."""

import torch

from matrix_llm.ssl.modeling import SyncBatchNorm


def test_one_process_of_the_rank_wide_normalisation_is_batch_normalisation():
    torch.manual_seed(0)
    for ordinary, x in (
        (torch.nn.BatchNorm1d(3), torch.randn(5, 3)),
        (torch.nn.BatchNorm2d(3, affine=False), torch.randn(2, 3, 4, 5)),
    ):
        ours = SyncBatchNorm(3, affine=ordinary.affine)
        ours.train(), ordinary.train()
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        weights = torch.randn_like(x)
        (ours(a) * weights).sum().backward()
        (ordinary(b) * weights).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
        for name, value in ordinary.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value)
        torch.testing.assert_close(ours.eval()(x), ordinary.eval()(x))

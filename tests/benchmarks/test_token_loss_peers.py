"""benchmarks/token_loss_peers.py: what it runs is the checkout's code, and a difference shows."""

import pytest

from benchmarks.token_loss_peers import asft_and_gem, compare, dft_and_beyond

GEM = """
class SFTTrainer(Trainer):

    def gem_loss(self, logits, labels, beta=0.7, ignore_index=-100, h="logsigmoid"):
        z, y = logits[0, :-1].float(), labels[0, 1:]
        z, y = z[y != -100], y[y != -100]
        gap = z - z.gather(1, y[:, None])
        weight = torch.sigmoid(0.01 * gap) if h == "logsigmoid" else 1
        return ((torch.softmax(z / beta, -1) * weight).detach() * gap).sum(-1).mean()
"""

DFT = """
            if not use_sp:
                loss = loss_fct(shift_logits, shift_labels)
                loss = FACTOR * loss * torch.exp(-loss.detach())
                loss = loss * loss_mask
            else:
                raise ValueError
"""


@pytest.mark.parametrize(("factor", "same"), [(1, True), (1.01, False)])
def test_lines_of_a_checkout_are_run_and_a_difference_shows(tmp_path, factor, same):
    path = tmp_path / "DFT/verl/verl/trainer/fsdp_dft_trainer.py"
    path.parent.mkdir(parents=True)
    path.write_text(DFT.replace("FACTOR", str(factor)))
    (peer,) = dft_and_beyond(tmp_path)
    value, largest, gradient, steepest = compare(peer)
    assert (value < 1e-12 * largest, gradient < 1e-12 * steepest) == (same, same)
    assert same or (value / largest, gradient / steepest) == pytest.approx((0.0099, 0.0099), rel=0.01)


def test_a_function_of_a_checkout_is_run_in_float64(tmp_path):
    (tmp_path / "GEM").mkdir()
    (tmp_path / "GEM/sft_trainer.py").write_text(GEM)
    peers = list(asft_and_gem(tmp_path))
    assert len(peers) == 6
    for peer in peers:
        value, largest, gradient, steepest = compare(peer)
        assert value < 1e-12 * largest
        assert gradient < 1e-12 * steepest


def test_without_a_checkout_nothing_is_compared(tmp_path):
    assert [*dft_and_beyond(tmp_path), *asft_and_gem(tmp_path)] == []

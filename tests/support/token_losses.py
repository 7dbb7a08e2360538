"""Logits, labels and everything else that a token loss may read, at awkward sizes; and every loss in every form."""

import torch

from matrix_llm.losses import token_loss

F64 = torch.float64

# Every branch of every loss: (name, settings)
CASES = [
    ("ce", {}),
    ("dft", {}),
    ("minus_p", {}),
    ("power", {"alpha": 0}),
    ("power", {"alpha": 0.3}),
    ("power", {"alpha": 8}),
    ("power", {"alpha": -0.2}),
    ("threshold", {"base": "p", "side": "top", "at": 0.1}),
    ("threshold", {"base": "p", "side": "bottom", "at": 0.1}),
    ("threshold", {"base": "logp", "side": "top", "at": 0.1}),
    ("threshold", {"base": "logp", "side": "bottom", "at": 0.1}),
    ("focal", {"gamma": 0}),
    ("focal", {"gamma": 0.5}),
    ("focal", {"gamma": 2}),
    ("focal", {"gamma": 5}),
    ("eaft", {}),
    ("eaft", {"alpha": 2, "k": 3, "scale": 1}),
    ("asft", {"weight": 0.05}),
    ("asft", {"weight": 0.7, "direction": "model_ref"}),
    ("label_smoothing", {"epsilon": 0.2}),
    ("z_loss", {"weight": 0.3}),
    ("gem", {}),
    ("gem", {"beta": 0.3, "h": "logsigmoid"}),
    ("ntl", {}),
    ("ntl", {"squash": 3, "reweigh": True}),
    ("ntl", {"kind": "mse"}),
    ("ntl", {"kind": "mse", "reweigh": True, "weight": 0.3}),
    ("emo", {}),
    ("emo", {"clamp": None, "with_target": False}),
    ("emo", {"mode": 2}),
    ("emo", {"mode": 2, "with_target": False}),
    ("kd", {"temperature": 1.7}),
    ("kd", {"beta": 1, "temperature": 0.6}),
    ("kd", {"beta": 0.3, "temperature": 1.7}),
    ("kd", {"top_k": 4, "temperature": 1.7}),
    ("kd", {"top_k": 4, "renormalise": False}),
    ("kd", {"top_k": 4, "beta": 0.3}),
    ("soft_ce", {}),
]

# Those whose value is -tr(P log Q), with the whole dense logarithm
MATRIX_CASES = [("mce", {}), ("soft_mce", {}), ("soft_mce", {"top_k": 2})]


def name_of(case):
    """The id of a case of a parametrized test: emo-mode=2."""
    loss, settings = case
    return "-".join([loss, *(f"{key}={value}" for key, value in settings.items())])


def problem(n, v, *, d=5, removed=0, seed=0, scale=2.0):
    """(logits (n, v), labels (n,), what else `token_loss` takes), in float64.

    The last `removed` tokens have logits of -inf, in the teacher too; the last token has a zero vector; the second of
    several labels is ignored. The first label is a number, the last is none.
    """
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, v, dtype=F64, generator=g)
    teacher = scale * torch.randn(n, v, dtype=F64, generator=g)
    labels = torch.randint(0, v - max(removed, 1), (n,), generator=g)
    embeddings = torch.randn(v, d, dtype=F64, generator=g)
    embeddings[-1] = 0
    number_ids = torch.tensor([4, 1, 3, 0])
    labels[-1], labels[0] = 5, 3
    if n > 2:
        labels[1] = -100
    if removed:
        logits[:, -removed:] = -torch.inf
        teacher[:, -removed:] = -torch.inf
    others = {
        "embeddings": embeddings,
        "teacher_logits": teacher,
        "number_ids": number_ids,
        "number_values": torch.tensor([0.0, 1.5, 7.0, -2.0]),
    }
    return logits, labels, others


def value_and_gradient(logits, labels, loss, **kwargs):
    """The values (N,), and the gradient of their sum in the logits."""
    z = logits.clone().requires_grad_()
    value = token_loss(z, labels, loss, **kwargs)
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]

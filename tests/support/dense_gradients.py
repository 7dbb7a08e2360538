"""Gradients of a token loss by dense float64 autograd, through the model's own LM head."""

import torch

from tests.support.tiny import V, tiny_model

N = 11


def case(name):
    """(model in float32, hidden states, labels)"""
    model = tiny_model(name).eval()
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        bias.data = torch.linspace(-2, 2, V)  # it starts at zero, where a lost bias would not show
    ids = torch.arange(N).unsqueeze(0) * 7 % V
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
    return model, ids, hidden, torch.arange(N) * 5 % V


def slow_reference(model, ids, labels, loss, group):
    """(values (N,), gradient in the hidden states (N, H), in the LM head's weight (V, H) over the group), float64.

    The model's own LM head and transform, by its own forward with the hidden states put in.
    """
    model = model.double()
    states = {}

    def put_in(module, inputs):
        states["h"] = inputs[0].detach().requires_grad_(True)
        return (states["h"],)

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(put_in)
    logits = model(input_ids=ids).logits[0]
    hook.remove()
    values = loss(logits, labels)
    (in_hidden,) = torch.autograd.grad(values.sum(), states["h"], retain_graph=True)
    (in_head,) = torch.autograd.grad(values[group].sum(), head.weight)
    return values.detach(), in_hidden[0], in_head

"""The token losses on whole logits, a small function each, differentiated by autograd: the fused head's reference.

`reference` (next to this folder) checks what it is given, picks the counted positions and calls one function of the
table. Here: positions (what such a function reads), label (losses of the label's probability), vectors (EMO and MCE),
teacher (distillation, ASFT and targets from a second model), numbers (the number token loss, and which tokens are
numbers).
"""

"""Fine-tune causal language models with matrix cross-entropy.

Start with `information` (entropies of matrices) and `mce` (the token loss), which need torch alone; then `config` (the
settings of a run), `trainer`, and `train` (the command). They are built on these rooms, bottom up: base, loss, data,
model, run, plan and publish. `ssl` is the image side.
"""

__version__ = "0.1.0"

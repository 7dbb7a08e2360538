"""Pre-training on a `transformers.Trainer`.

Read `trainer.py` first, then `callbacks.py` (the target network's moving average) and `optimizers.py`. `lars.py` is
one of the optimizers; the linear probe uses it too.
"""

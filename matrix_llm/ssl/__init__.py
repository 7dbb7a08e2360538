"""Self-supervised learning of images: Matrix-SSL and its baselines, on the matrix functions of
`matrix_llm.information`.

Read `losses/`, `methods.py` (which loss and which heads a method has), `models/`, `images/`, `training/`, then the
command `pretrain.py`. `evaluation/` with `evaluate.py`, `transfer/` with `export.py`, and `figures.py` work on its
output. `modeling.py`, `data.py`, `augment.py` and `trainer.py` only re-export public names. `import matrix_llm`
imports nothing from here, and `losses` and `metrics` need torch alone.
"""

"""How good a backbone's features are. The command is `ssl/evaluate.py`.

Read `features.py` first, then the probes on frozen features (`neighbours.py`, `linear.py` with `label_draws.py`) and
the classifiers that are trained (`trained.py`). `passes.py` runs a backbone over images, `subjects.py` finds the
network, `splits.py` the images and their labels. `settings.py` has the command's options, and `protocols.py` puts it
all together.
"""

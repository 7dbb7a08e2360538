"""Images: read from their source, and turned into two augmented views.

Read `dataset.py` first (what a source is), then `load.py` with the kinds of sources (`builtin.py`, `files.py`,
`hub.py`) and `decode.py`. For the views: `settings.py`, `draws.py` (the random numbers), `crops.py` (in the loader's
workers) and `augment.py` (the rest, on the device). `eval_transform.py` is what an image goes through when it is not
augmented.
"""

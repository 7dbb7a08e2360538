"""The plan of a run, made before a weight is loaded; `--dry_run` prints it.

`steps` has the arithmetic of batches and steps, the loss in words and a row with its mask; `memory` estimates the
memory per GPU.
"""

"""A run, from its recipe to its folder: the command, its data, its checkpoints, and how it ends.

Read command.py (the one `main`), lock.py and run_folder.py first, then inputs.py (files that a resumed run must find
unchanged), prepare.py (the data), rehearsal.py (saving, tried before training), checkpoint_files.py and saving.py
(checkpoints that are complete or absent), preemption.py (signals) and failures.py (full disks, lost processes).
metrics.py, window.py, evaluation.py and decode.py are what a run measures, and engine_accuracy.py with scoring.py what
another engine measures for it; consolidate.py turns sharded checkpoints
into plain weights, and pickles.py reads them so that none can run code.
"""

"""Was the answer right? Strings in, verdicts out; no model, no torch.

Read `answers` first, then `extraction` and `ladder` (our own convention) and `conventions` (the five published ones).
Below them: `text` and `latex` read and tidy strings, `structures` and `expressions` parse them into trees, `values`
computes, `equality` compares trees, and `symbolic` asks sympy in a process that can be killed (`symbolic_worker`).
"""

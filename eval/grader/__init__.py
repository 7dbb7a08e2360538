"""Was the answer right? Strings in, verdicts out; no model, no torch.

Read `answers` first, then what "verified", our own convention, does: `find_number` and `find_formula` take the answer
from a response (`statements` is what they share), `ladder` compares it with the gold, `copying` asks whether it is more
than the question, and `golds` reads what a gold may say besides a value. `conventions` are the five published ones.

The ladder's rungs, from the bottom: `text`, `words` and `units` read numbers; `latex` tidies up; `structures` parses an
answer into one of the `kinds`, with `expressions` in it; `equality` compares two of them, by `values` and `sets`;
`symbolic` asks sympy in a process that can be killed (`symbolic_worker`).
"""

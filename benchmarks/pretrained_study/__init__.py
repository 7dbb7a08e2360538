"""The study of a pretrained model: does MCE help SmolLM2-135M on GSM8K?

Read preregistration.md first (the question, and the rules of decision, written before any run), then design (arms,
sizes, rates), rows (which rows a seed draws), split (frozen lower layers, trained upper layers), cache (what the
frozen layers make of every row, computed once), training, measuring and mechanism (one run), one_run (its process),
folder (what the study leaves on disk), run (makes what is missing), analysis (the verdicts), report (the page), cost
(what a run takes on this machine), large (the same arms at 7B), and command.

The statistics, and the reading of results of runs elsewhere, are those of benchmarks/study.
"""

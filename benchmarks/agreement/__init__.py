"""Scores of eval/gsm8k.py beside those of lm-evaluation-harness; `benchmarks/harness_agreement.py` runs it.

Read in this order: `answers` (both programs' files into one form), `compare` (what differs between two runs of the same
problems, and why), `tokens` (how close the model was to the other token), `tables` (the page).
"""

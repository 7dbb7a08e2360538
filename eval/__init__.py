"""Evaluation on GSM8K, MATH and their like: responses are generated once and saved, and can be graded again at any
time.

Commands: score.py, gsm8k.py and hendrycks_math.py (measure a model), compare.py (two runs), regrade.py (every
convention on saved responses), contamination.py (test questions among training rows). As a library: `eval.answers` and
`eval.statistics`. Rooms, each using those before it: `grader`, `report`, `generate`.
"""

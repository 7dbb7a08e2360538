"""Evaluation on GSM8K and MATH: generation and grading are separate steps over one saved file."""

"""Fine-tune causal language models with matrix cross-entropy.

`matrix_llm.information` and `matrix_llm.mce` need torch alone; the trainer is in `matrix_llm.trainer`, the command line in
`matrix_llm/train.py`.
"""

__version__ = "0.1.0"

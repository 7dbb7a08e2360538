"""Measurements of matrix_llm: the controlled study of the losses, and a file or package for each other figure in docs/.

The package matrix_llm imports nothing from here. Every .py file at this level is a command; the packages `study` and
`lm_head` hold the code of the two larger ones.
"""

"""Measurements of matrix_llm: the controlled study of the losses, and a file or package for each other figure in docs/.

Nothing here is imported by the product. Every .py file at this level is a command; the packages `study` and `lm_head`
hold the code of the two larger ones.
"""

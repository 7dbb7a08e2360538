"""Self-supervised learning of images: Matrix-SSL and its baselines, on the matrix-information functions of `matrix_llm.information`.

`losses`, `metrics` and `gather` need torch alone, and nothing here is imported by `import matrix_llm`.
"""

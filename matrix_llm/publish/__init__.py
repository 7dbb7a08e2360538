"""Publishing a finished run: its model card, the checks before a push, and the push to the Hugging Face Hub.

Reading order: `finished_run` (what a run's folder holds), `markdown`, `base_model` and `card` (README.md), `names` and
`checks` (what is refused without a network), `client` (requests, retries and their errors), `destination` (where a
recipe's run goes), `push`, and `command` (`python -m matrix_llm.hub`). `merge` (`python -m matrix_llm.merge`) makes a
plain model of a LoRA run.
"""

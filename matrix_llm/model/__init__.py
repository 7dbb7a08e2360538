"""The causal language model: its tokenizer, weights and adapters, and the loss inside its forward.

Read pretrained (loading by name), tokenizer, load (weights), adapters (LoRA, fewer bits); then early_checks and
adapter_checks, which refuse what does not fit the model before a row is read; then lm_head, which puts the matrix loss
into the model's forward, teacher (a second model whose distribution is the target), and packing, which proves that
packed rows do not see each other. older_readers writes what transformers 4.57 needs into a saved folder.
"""

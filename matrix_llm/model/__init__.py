"""The causal language model: its tokenizer, weights and adapters, and the loss inside its forward.

Read pretrained (loading by name), tokenizer, load (weights), adapters (LoRA, fewer bits) and adapter_checks (what they
would match); then lm_head, which puts the matrix loss into the model's forward, and packing, which proves that packed
rows do not see each other.
"""

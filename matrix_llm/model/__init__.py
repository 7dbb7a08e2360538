"""The causal language model: its tokenizer, weights and adapters, and the loss inside its forward.

<<<<<<< HEAD
Read pretrained (loading by name), tokenizer, load (weights), adapters (LoRA, 4 bits); then lm_head, which
puts the matrix loss into the model's forward, and packing, which proves that packed rows do not see each other.
older_readers writes what transformers 4.57 needs into a saved folder.
=======
Read pretrained (loading by name), tokenizer, load (weights), adapters (LoRA, fewer bits) and adapter_checks (what they
would match); then lm_head, which puts the matrix loss into the model's forward, and packing, which proves that packed
rows do not see each other.
>>>>>>> adapters
"""

"""The causal language model: its tokenizer, its weights, its adapters, and the loss inside its forward.

Read pretrained (what is found under a name), tokenizer, load (weights), adapters (LoRA, 4 bits); then lm_head, which
puts the matrix loss into the model's forward, and packing, which proves that packed rows do not see each other.
"""

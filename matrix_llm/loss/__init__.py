"""The token loss, CE + mce_weight * MCE, fused with the LM head. Torch alone (kernels.py needs Triton, on a GPU).

Besides CE there are other token losses: choice has their table, with the settings of each; token_terms and teachers
have one function for each, and table says which; reference computes any of them on whole logits, by the functions of
dense/.

`matrix_llm.mce` is the public interface. Read settings (what is asked for), krylov (MCE by Lanczos), vocabulary and
head_tail (the cheaper form that keeps a few tokens exactly), solvers (one chunk of positions), fused (LM head, loss and
gradients chunk by chunk; chunks says how many positions fit at once), linear (the autograd function around it). kernels
does head_tail's work on a GPU. soft_targets is MCE with a teacher's distribution as the target, and block_krylov and
soft_head_tail are krylov and head_tail for it. products multiplies in mixed precision; positions finds the labels.
"""

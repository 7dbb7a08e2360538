"""A token loss + mce_weight * MCE, fused with the LM head. Torch alone (kernels.py needs Triton, on a GPU).

`matrix_llm.mce` and `matrix_llm.losses` are the public interface. In the order of reading:

MCE       settings (what is asked for), krylov (MCE by Lanczos), vocabulary and head_tail (the cheaper form that keeps a
          few tokens exactly), solvers (one chunk of positions). kernels does head_tail's work on a GPU. soft_targets
          is MCE with a teacher's distribution as the target; block_krylov and soft_head_tail are krylov and head_tail
          for it.
losses    choice (which token losses there are, with the settings of each), token_terms and teachers (value and gradient
          of each from a chunk's statistics), table (by name). reference computes any of them on whole logits, by the
          functions of dense/.
the pass  fused (LM head, losses and gradients chunk by chunk; chunks says how many positions fit at once, products
          multiplies in mixed precision, positions picks those with a label), linear (the autograd function around it)
"""

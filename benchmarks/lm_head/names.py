"""Names of the implementations that tables and plots single out."""

OURS = "matrix_llm, CE + MCE"
OURS_AGAIN = "matrix_llm, CE + MCE, later micro-batch"
OURS_CE = "matrix_llm, mce_weight 0"
PRODUCTS = "three products alone"  # the floor: no loss, only the matrix products that any fused head must make
EAGER = "torch, eager"
TORCH_REFERENCE = "torch linear_cross_entropy, default"
CE = "ce"  # the group of `--losses` that all others are compared with
THEIRS, THEIRS_CE = "the other checkout, CE + MCE", "the other checkout, mce_weight 0"

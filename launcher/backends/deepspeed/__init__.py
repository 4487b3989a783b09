"""DeepSpeed-Inference: `engine` has its options for the launcher, `backend` runs in the ranks."""

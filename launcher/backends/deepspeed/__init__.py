"""DeepSpeed-Inference."""

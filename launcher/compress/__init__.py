"""Make smaller checkpoints from existing ones, by pruning or quantization."""

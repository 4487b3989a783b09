"""Layers whose matrices are stored in fewer bytes: quantized while they are read, or read as a checkpoint has them."""

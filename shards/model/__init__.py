"""Sizes of a model from its configuration, quantized or not; no tensor is touched."""

"""Continuous batching for engines that are a transformers module: a cache of slots, and who is in them."""

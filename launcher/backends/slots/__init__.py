"""Continuous batching for engines that run a transformers module: a cache of slots, and the schedule of its
sequences."""

"""Speculative decoding in slots: draft tokens, their check by the target, and which of them are accepted."""

"""Prompts: prompt sets as token ids, and their division into calls."""

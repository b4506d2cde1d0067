"""Engines write completions: ``hf`` (the live policy) and ``scripted`` (recorded rollouts)."""

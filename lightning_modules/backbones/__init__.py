"""Backbones: tiny offline ones, loading from disk or hub, LoRA, export, the warm start."""

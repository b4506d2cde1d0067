"""Generative reward models: a language model that writes an analysis, then a verdict."""

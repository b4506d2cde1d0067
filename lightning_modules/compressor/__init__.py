"""Compressor and decoder: texts as memory vectors, and what is read out of them again."""

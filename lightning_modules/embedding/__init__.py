"""Embedding models: one vector a text, trained so that a query lies near what answers it."""

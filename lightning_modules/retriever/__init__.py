"""Retrievers: encoders trained and measured by what a search agent makes of their answers."""

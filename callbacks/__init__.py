"""Callbacks: what cuts across methods. They know modules by their hooks, never by their class."""

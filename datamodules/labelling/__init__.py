"""Measured utility of passages: trajectories, judges, continued rollouts, selection."""

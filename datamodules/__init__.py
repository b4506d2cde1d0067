"""Data: loaders, rollouts, tasks with verifiers, sources and the engines that write completions.

Nothing here imports ``lightning_modules``: a datamodule talks to the module through its hooks.
"""

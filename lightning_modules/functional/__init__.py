"""Pure functions: tensors in, tensors out. They hold the maths; classes elsewhere only wire them.

Nothing here logs, steps or knows a model. Metrics leave as sums and counts (see ``sums``), so that
accumulation windows and ranks can be added up before anything is divided.
"""

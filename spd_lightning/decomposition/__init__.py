"""The decomposition method: tensors in, tensors out.

Read in this order: `components` (sites and their rank-one components), `importance`, `masks`,
`model` (the target under masks), `reconstruction`, `losses`, `metrics`.

No module of this package reads a file, writes a log, plots, or depends on a particular model.
"""

"""Training of targets and decompositions with Lightning, with checkpoints, trackers and figures."""

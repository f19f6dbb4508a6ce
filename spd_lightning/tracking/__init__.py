"""Copies of runs in trackers: MLflow, Weights & Biases, and other loggers of Lightning."""

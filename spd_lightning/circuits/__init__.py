"""Sparse circuits: the few components that one prediction needs, found by optimization."""

"""Estimates of a fit before it starts: memory, FLOPs, hours."""

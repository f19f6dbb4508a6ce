"""Tiny stories whose hidden variables are known."""

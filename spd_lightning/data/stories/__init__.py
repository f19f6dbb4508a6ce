"""Tiny stories with known hidden variables."""

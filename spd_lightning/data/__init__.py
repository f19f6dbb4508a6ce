"""Data: batches, corpora, tokenized text, generators with known truth."""

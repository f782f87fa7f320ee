"""Sequences, segments, attention by log-sum-exp merge, settle, the model view, the ledger and the transformers cache."""

"""Checkpoints on disk: their format, their folder, and what a later plan reads of them. No torch, no ray."""

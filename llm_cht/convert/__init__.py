"""Checkpoints into sparse starts, back, and into smaller models, a block of rows at a time."""

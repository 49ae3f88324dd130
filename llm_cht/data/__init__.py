"""Data: sources, tokenizers, packing, and an order that is a function of seed and epoch."""

"""Sparse layers, the surgery that puts them into a model, and the folder format they are saved in."""

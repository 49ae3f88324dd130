"""Topology updates of a live model: gather inputs, compute, apply."""

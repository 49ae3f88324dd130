"""A grid of settings over seeds, one run after the other, and the table that compares them."""

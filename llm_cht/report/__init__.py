"""One self-contained page of pictures about a run."""

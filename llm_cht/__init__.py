"""Sparse pre-training of language models whose topology evolves while they learn (Cannistraci-Hebb training).

The rooms, from the bottom up: ``config`` and ``dist``; ``topology`` (pure rules on masks); ``sparse`` (layers and model
surgery); ``models`` and ``data``; ``evolve`` (topology updates of a live model); ``train`` and ``report``; ``cli``.
"""

__version__ = "0.1.0"

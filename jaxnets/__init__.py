"""Lightweight image classifiers in JAX: exact against PyTorch's weights, and fast to train."""

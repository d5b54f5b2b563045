"""Weights of other code bases: read from disk, matched with a net's layers, and where they and our nets differ."""

"""Captions to fine clusters to data experts."""

"""Recipes and runs: the whole method in one folder."""

"""Embeds captions, clusters them, and forms data experts of the clusters."""

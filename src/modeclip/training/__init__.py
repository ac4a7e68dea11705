"""Training the seed, the experts and their controls."""

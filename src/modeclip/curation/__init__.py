"""Which pairs are trained on: methods that look at a pool and mark pairs, weigh them, or change their captions."""

"""Search: an index of image vectors that texts and pictures are looked up in, with the mixture routed per query."""

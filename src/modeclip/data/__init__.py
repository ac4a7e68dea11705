"""Image-caption pairs: where they come from, the catalog that holds them, and the tasks that models are asked."""

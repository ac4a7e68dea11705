"""Everything that people look at: pages, pictures and their one style."""

"""CLIP models: loading, saving, counting their work, and the vectors they give."""

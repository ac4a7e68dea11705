"""Data experts as one model: routing rules, bundles, and the CLIP that a task is answered by."""

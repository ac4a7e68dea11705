"""CLIP models: loading, saving, counting their operations, and the vectors that they and the encoders compute."""

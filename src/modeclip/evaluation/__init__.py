"""What models can do, measured with intervals."""

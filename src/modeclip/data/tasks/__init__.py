"""What models are asked: images, and class names, texts or candidates to tell them apart."""

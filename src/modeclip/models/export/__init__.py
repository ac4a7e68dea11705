"""A CLIP in the formats of other tools: Hugging Face's ``CLIPModel``, and ONNX graphs."""

"""Making a model out of models: fine-tuning and merging."""

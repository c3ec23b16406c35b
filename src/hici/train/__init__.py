"""Adapting a model: a recipe, the Hugging Face Trainer underneath, one adapter directory as the result."""

"""Measurements of a model: perplexity, and differences between modes with their uncertainty."""

"""Retrieval: something hidden in a long prompt, and a question about it. Prompts come from seeds, or from files."""

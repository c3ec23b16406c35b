"""Text and token files into token documents, packed sequences and held-out sets."""

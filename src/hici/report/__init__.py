"""What a result was made with, and pictures of results."""

"""What a run measures of itself, and how it gets out."""

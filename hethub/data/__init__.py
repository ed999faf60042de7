"""Training data: text to token files, token files to rows as a pure function of (seed, step, row)."""

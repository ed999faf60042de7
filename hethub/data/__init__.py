"""Text in, rows of tokens out: tokenizers, token files, and the order of samples as a pure function."""

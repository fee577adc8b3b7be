"""Teachers, tokenizers and students."""

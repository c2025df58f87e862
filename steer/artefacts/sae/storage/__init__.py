"""How an SAE is kept: arrays in files, rows of them, and the canonical file."""

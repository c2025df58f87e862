"""The SAE of SmolLM2: what it was trained on (`texts`) and how (`python -m` this package)."""

"""Vectors for SmolLM2-135M-Instruct, each made from a sentence; `wishes.json` has the sentences."""

"""Inspection: what a model's hidden states say. One method per file, on any engine."""

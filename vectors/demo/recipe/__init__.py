"""Trains the demo chat model from nothing, on a corpus this package generates."""

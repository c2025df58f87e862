"""Asking about states in words: by a trained oracle, or by the model as it is."""

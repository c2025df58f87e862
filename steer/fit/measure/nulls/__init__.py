"""Nulls: vectors that know nothing of the attribute, held against one that should, at equal KL."""

"""`steer generate`: answers side by side, and what was read of their tokens."""

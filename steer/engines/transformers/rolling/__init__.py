"""Padded rows: the running batch of a model whose sequences may share a pass, on any device.

- `cache`: keys and values of rows that come and go, aligned at their right end.
- `batch`: prompts that join it, a pass for all, rows that leave.
"""

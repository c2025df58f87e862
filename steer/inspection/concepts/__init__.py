"""Roles and their fillers, read from states by a vector-symbolic probe (2509.25045).

- `request`: what is asked.
- `method`: how the answer comes about.
- `result`: the answer, and its picture.
"""

"""A vector-symbolic probe: pairs of a role and its filler, read from states (2509.25045).

- `codebook`: names as long vectors of ±1, how they are bound, bundled and read back.
- `probe`: states to such a vector, by a small network.
- `result`: the answer, and its picture.
- `method`: the request, and how the answer comes about.
"""

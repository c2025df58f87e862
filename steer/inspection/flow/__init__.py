"""Attention flow: what each head reads at which token and writes at another (2305.13417).

- `result`: the answer, a graph of nodes and edges.
- `edges`: a head's output taken apart by the token that it attends to.
- `method`: the request, and how the answer comes about.
- `drawing`: the answer as a picture.
"""

"""Clusters of states, each told by the texts that lie nearest its middle.

- `tree`: states joined step by step, and where the tree is cut.
- `result`: the answer, and its picture.
- `method`: the request, and how the answer comes about.
"""

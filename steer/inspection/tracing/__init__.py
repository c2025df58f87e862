"""Causal tracing (2202.05262): which states carry what a subject tells the model.

- `noise`: the subject's embeddings disturbed, and one state put back, as plans.
- `result`: what a tracing answers.
- `method`: the request, and the runs.
"""

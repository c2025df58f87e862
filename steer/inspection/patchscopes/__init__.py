"""Patchscopes: a state put into another run, which then says what it holds (2401.06102).

- `target`: the prompts that read states, and the place to patch.
- `patched_runs`: runs of a target, each with a state of its own.
- `method`: the request, and how the answer comes about.
- `result`: the answer, cell by cell.
"""

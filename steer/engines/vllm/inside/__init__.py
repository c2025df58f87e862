"""What lies inside attention and MLP beside their states: output projections, and what heads attend
to.

- `projections`: the output projections of this worker's layers, asked by themselves.
- `layers`: which attention of vLLM's belongs to which layer, and what it is handed in a pass.
- `queries`: what it is handed of states that are put before the layer, between two steps.
- `notes`: what one request's tokens were handed, by position.
- `weights`: the weights that this makes, and whether they are those that the attention used.
"""

"""Direct logit attribution: what each part of a model gives to a token's logit.

- `head`: what follows the last block as a linear function, its norm held at one state's scale.
- `parts`: what attention, MLP, their heads and neurons add to the residual stream.
- `method`: the request, the answer, and how they come about.
- `drawing`: the answer as a heat map.
"""

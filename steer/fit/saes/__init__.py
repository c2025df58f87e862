"""Training sparse autoencoders on captured states.

- `options`: sizes, rates, and what is trained.
- `activation`: how pre-activations become activations, in a way that learns.
- `network`: the weights while they are trained, and the SAE that they make.
- `loss`: what is minimised: what is left over, dead latents, sparsity, labels.
- `rows`: the captured rows, drawn in an order that any step can be begun from.
- `trainer`: the steps, and checkpoints between them.
- `training`: from folders of states to an SAE with its measures.
- `measures`: how well an SAE stands for states it was not trained on.
"""

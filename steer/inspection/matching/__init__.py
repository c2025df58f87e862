"""Which registered vectors a state points along, and whether that is more than chance.

- `background`: states of other texts, and random directions that vary as they do.
- `method`, `result`: which vectors states match.
- `coordinates`, `scatter`: where several prompts' states lie in the space of a few.
"""

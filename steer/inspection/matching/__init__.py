"""Which registered vectors a state points along, and whether that is more than chance.

- `background`: states of other texts, and random directions that vary as they do.
- `method`: the request, and how the answer comes about.
- `result`: the answer, and its picture.
"""

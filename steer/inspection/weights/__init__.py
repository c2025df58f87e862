"""What is written in a model's weights, read as tokens (2209.02535): no prompt runs.

- `vocabulary`: vectors of the residual stream as scores of tokens.
- `embeddings`: what the stream begins with for each token, some at a time.
- `parts`: what heads and neurons write, and what they make of a token.
- `pairs`: the strongest pairs of tokens, and how far a head copies, from two thin matrices.
- `request`, `result`, `method`, `drawing`: what is asked, the answer, how it comes, a picture.
"""

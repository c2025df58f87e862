"""What can be read from a real model's states, beside what could be read without them.

`python -m benchmarks.inspection --model /path/to/a/model` repeats the experiments of Patchscopes
(2401.06102) with the controls of 2509.13316: the next token by layer, an attribute of a subject,
and two hops. Not speed: every figure has an interval over contexts or facts.
"""

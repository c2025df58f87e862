"""A vector-symbolic probe: pairs of a role and its filler, read from states (2509.25045).

- `codebook`: names as long vectors of ±1, how they are bound, bundled and read back.
- `network`: states to such a vector, by a small network, and how it is trained.
- `form`: what a probe's card says: its names, its place, and how well it reads.
- `probe`: the artefact.
- `lesson`: examples parted into those that teach and those that try, and what comes of them.
"""

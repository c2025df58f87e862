"""Features of SAEs, from data: what each does (`surveying`, which counts with a `tally` and keeps
`examples`), and which tell two sets of texts apart (`contrast`, of activations that are pooled)."""

"""Read-outs: small numbers that are read off states while a request runs, for each of its tokens."""

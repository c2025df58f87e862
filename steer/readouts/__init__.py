"""Read-outs: a few numbers for each token of a request, read off its states while it runs."""

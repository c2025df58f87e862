"""`steer sae`: the features of sparse autoencoders."""

"""What features of an SAE do on a real model, beside vectors, words and chance."""

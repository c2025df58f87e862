"""SAEs: what a clamp costs (`clamps`), what features do beside vectors, words and chance, and what
loaded SAEs keep in memory."""

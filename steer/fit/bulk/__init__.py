"""States of many texts on disk: `selected` says of which tokens, `capturing` writes them in shards,
`shards` reads rows of them."""

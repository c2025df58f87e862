"""States of many texts on disk: `capturing` writes them in shards, `shards` reads rows of them."""

"""Models that are asked about features over HTTP, at places which the operator has named."""

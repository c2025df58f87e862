"""POST /v1/responses: its request, its body, its events."""

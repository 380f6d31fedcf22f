"""Several nodes: servers that share a PostgreSQL store and a Redis."""

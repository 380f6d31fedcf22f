"""Authentication: tokens, JSON Web Tokens, and the sockets of principals."""

"""What the tests and the benchmarks share: stand-ins for the world around the server."""

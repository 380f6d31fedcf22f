"""Claude, against a server that speaks the Messages API and all its faults."""

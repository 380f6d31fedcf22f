"""Settings with high limits, because all clients of a test share an address and a principal.

Titles are off, because a title is another request to the model.
"""

__all__ = ["CROWD"]

MANY = "1000000"

CROWD = {
    "WSSERVER_CONNECTIONS_PER_ADDRESS": MANY,
    "WSSERVER_CONNECTIONS_PER_PRINCIPAL": MANY,
    "WSSERVER_DOLLARS_PER_DAY": "0",
    "WSSERVER_FRAME_BURST": MANY,
    "WSSERVER_FRAME_RATE": MANY,
    "WSSERVER_GENERATIONS_PER_PRINCIPAL": MANY,
    "WSSERVER_PROMPTS_PER_MINUTE": MANY,
    "WSSERVER_TITLES": "off",
    "WSSERVER_TOKENS_PER_DAY": "0",
}
"""Environment variables. What a test says of a limit it sets itself, and wins."""

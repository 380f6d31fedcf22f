"""Connections: what one client on a WebSocket asks, and what it gets.

==============  ===============================================================
``connection``  answers each frame at once, queues it, or refuses it
``session``     what the parts of a connection share
``requests``    the queue of frames that need the store
``following``   the generations and conversations that the client follows
``cursor``      the position of a client in one log
``stopping``    answers a stop when all that it names has ended
``histories``   pages of histories and lists that fit into a frame
==============  ===============================================================
"""

"""Sockets: from the listening socket to the frames of a WebSocket. They know no application.

===================  ===================================================================
``listener``         accepts connections and counts them
``listening``        binds and names listening sockets
``service_manager``  sockets and messages of systemd
``certificates``     certificates that may change while the server runs
``peers``            the user whose program is at the other end
``tcp``              what all connections of clients have in common
``tls``              TLS on a connection
``exchange``         one request and its response
``http``             parses requests
``streaming``        a response whose body is written while it is made
``websocket``        frames messages, and watches the client
===================  ===================================================================
"""

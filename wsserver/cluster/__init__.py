"""Several nodes: servers that share a PostgreSQL store and a Redis.

=====================  ====================================================================
``cluster``            this node, as the hub sees it: forwards, follows, mends after faults
``services``           what this node does when other nodes ask it
``leases``             the conversations that this node has, and decides on
``membership``         renews the life of this node, and buries nodes that died
``uses``               the limits of principals, decided in PostgreSQL
``mirrors``            copies of the replies of other nodes, for the clients of this one
``resynchronisation``  learns what was told while the bus was away
``readers``            the other ends of the mirrors: send the replies of this node
``peers``              requests, answers and messages between nodes
``bus``                carries messages over the pub/sub of Redis, and may lose them
``address``            the address of Redis, or of its Sentinels
``figures``            the metrics
=====================  ====================================================================
"""

"""Ports on loan: how a peer that nobody can dial is dialled all the same.

    dialler ----> [lent port] relay <==== control connection ==== borrower (behind NAT)
                              relay <---- one connection per dialler ---- borrower ----> its own listener

A relay is any reachable peer with a range of open TCP ports (`--relay`). It lends some to a peer that proves its
identity, tells it of every connection that arrives there, and joins that connection with one that the borrower makes
in return. So both of a peer's listeners, the Go daemon's and py-libp2p's, are reached by plain TCP, and neither needs a
relay protocol of its own. What passes is encrypted and authenticated end to end by the peers' own handshakes: a relay
sees who talks to whom, when, and how much.

The same port also tells a peer which address it is seen from, and whether its listeners can be dialled there.

And it introduces a dialler and a borrower to each other: routers let them through if both dial at the same time
(`punching.py`), and then nothing passes the relay (`shortcuts.py`).
"""

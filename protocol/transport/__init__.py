"""The py-libp2p data plane: a host in its own interpreter and the asyncio client that drives it.

Both processes have a side in everything that travels in streams:

                                       the trainer's (`client.py`)         the host's (`host.py`)
    `/shoal/fetch/1` (`wire.py`)
        a peer fetches from us         `answering.py`                      `serving.py`
        we fetch                       `fetches.py`, `downloads.py`        `fetching.py`
    `/shoal/call/1` (`call_wire.py`)
        a peer calls us                `handling.py`                       `receiving.py`
        we call                        `calls.py`                          `calling.py`
    between both (`ipc.py`)            `process.py`, `supervisor.py`       `channel.py`

Gossip (`gossip.py`, `inbox.py`), connections (`links.py`, `sockets.py`) and the streams themselves (`streams.py`,
`patience.py`) are the host's alone; what either may take is in `limits.py`.
"""

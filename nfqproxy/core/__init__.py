"""Pure decisions: which plan a frontend has, which backend a packet gets, what an existing entry means.

The worker, ``explain`` and the simulator call the same functions. Nothing here opens a socket, reads a
clock or draws from global randomness; chance comes in as ``random.Random``.
"""

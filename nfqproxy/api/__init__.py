"""What processes say to each other: the supervisor-worker channel and the admin socket.

Message types, framing and the socket's address live here; what is done about a message does not.
"""

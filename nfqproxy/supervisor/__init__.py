"""The supervisor: keeps workers alive and makes kernel and workers follow the service table.

Never here: decisions about packets (``core``), rule texts (``kernel``), file formats (``sources``).
"""

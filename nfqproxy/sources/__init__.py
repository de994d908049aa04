"""Where Services, EndpointSlices, Nodes and ServiceCIDRs come from.

Here belong the shapes of the Kubernetes API (:mod:`manifest`), their checking and decoding
(:mod:`schema`, :mod:`decode`), the reading of YAML and JSON text (:mod:`document`) and the sources
themselves (:mod:`file`). What never will: what the objects mean together (``control``).
"""

"""The lab: a small cluster in network namespaces with real servers, real load and the real proxy.

Belongs here: the address plan, topologies, servers, load generators, the demonstration scenario.
The kernel tests and the bench build on the first three. Nothing of the proxy imports this package.
"""

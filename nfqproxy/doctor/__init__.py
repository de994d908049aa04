"""Can this host run the proxy? One small check for every question, each with what to do.

Here belong: looking at the host as it is (read only), trying the kernel's abilities in throw-away
network namespaces, and the live self-test. Never here: mending anything, or changing the network
namespace that is examined. ``check`` holds the vocabulary, ``checklist`` the order.
"""

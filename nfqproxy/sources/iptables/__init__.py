"""The iptables-save source: what kube-proxy's rules say, as Services and EndpointSlices.

Text becomes tables of lines (:mod:`text`), a line becomes a rule (:mod:`rule`), the chains of one
family become service ports (:mod:`chains`, :mod:`ports`), service ports become ordinary manifests
(:mod:`manifests`), and those are decoded like any other (:mod:`source`). Nothing of the text is
trusted: what is no listing of rules at all is a ManifestError, a rule that is not understood is a
:class:`~nfqproxy.sources.iptables.text.Loss` that names its line, and the rest is still read.
"""

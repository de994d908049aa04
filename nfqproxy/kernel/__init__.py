"""The node's kernel state: bootstrap rules, sets, the fallback's maps, and what the kernel counts.

Everything here works through the tools an administrator has (iptables-restore, ipset, nft) on text
that can be printed beforehand. Decisions belong to ``core``; packets belong to ``worker``.
"""

"""The worker process: reads its NFQUEUE, decides by ``core``, installs conntrack entries, answers.

It needs nothing from the supervisor per connection: it holds the newest plans and looks routes up by
itself. Never here: Services, EndpointSlices, rules, sets.
"""

"""One module per kind of measurement; each is a :class:`bench.observation.Experiment`."""

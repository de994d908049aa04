"""The bench: what a new connection costs, measured on the real kernel, beside yardsticks.

Belongs here: building the network namespaces of a measurement, starting what is measured
(`contenders`), loading it, reading clocks and counters, checking that every connection was
handled right *before* its cost is reported, and the report. Comparisons are interleaved round by
round in one run, and a result carries everything needed to repeat it.

Never here: code that the proxy runs. The bench starts the proxy as a user does, by its command.
"""

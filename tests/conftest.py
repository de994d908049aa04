"""What holds for all tests.

Profiles of the property tests: NFQPROXY_HYPOTHESIS=deep runs at least 10,000 cases of each.
"""

import os
import signal

from hypothesis import settings

settings.register_profile("default", deadline=None)
settings.register_profile("deep", deadline=None, max_examples=10_000)
settings.load_profile(os.environ.get("NFQPROXY_HYPOTHESIS", "default"))

# A shell starts background jobs with SIGINT ignored, and children inherit that: the programs under test would
# not hear Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

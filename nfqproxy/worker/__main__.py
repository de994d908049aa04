"""``python -m nfqproxy.worker FD``: a worker process; FD is its end of the channel. The supervisor starts it."""

import sys

from nfqproxy.worker.process import run

if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1])))

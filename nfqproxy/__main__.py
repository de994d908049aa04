"""``python -m nfqproxy`` and the command ``nfqproxy``: loads the command line, then runs it."""

import signal
import sys


def main() -> None:
    """Entry point. Ctrl-C while modules are still being loaded ends like Ctrl-C later: quietly."""
    try:
        from nfqproxy.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        # The interpreter still waits for threads that finish a change: a second Ctrl-C waits as well.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    main()

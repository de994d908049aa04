"""``python -m nfqproxy`` is the command ``nfqproxy``."""

from nfqproxy.cli.main import main

if __name__ == "__main__":
    main()

"""The command line: arguments in, text or JSON out, exit codes. Everything else is elsewhere."""

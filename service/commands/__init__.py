"""The command line: a file for each command, and what those do that need no server."""

"""The command lines: flags, messages and files around the library."""

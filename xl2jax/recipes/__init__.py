"""How the bundled checkpoint is made. Nothing in the library needs it."""

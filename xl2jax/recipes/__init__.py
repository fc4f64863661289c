"""How the bundled checkpoint is made. The library does not depend on it."""

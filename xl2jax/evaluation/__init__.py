"""How right the model is: against upstream's own numbers (verify), and in long videos (needle)."""

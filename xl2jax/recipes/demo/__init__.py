"""The bundled checkpoint: its data sets, its stages of training, and what composes its training rows."""

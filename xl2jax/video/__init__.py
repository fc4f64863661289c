"""Video frames and their times: choosing frames, reading files, and decoding ahead of the model."""

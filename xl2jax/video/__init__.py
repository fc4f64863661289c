"""Frames and their times: which frames are taken, how files are read, how reading goes ahead of the model."""

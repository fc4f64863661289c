"""The process and what surrounds it: files, streams, signals, worker processes, devices."""

"""The process and its environment: files, standard streams, signals, worker processes and devices."""

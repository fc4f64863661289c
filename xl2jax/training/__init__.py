"""Training: batches, loss, optimizer, the loop. Upstream trains with dense causal attention, and so does this."""

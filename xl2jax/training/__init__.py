"""Training: data, loss, optimizer and the loop. As upstream, it uses dense causal attention."""

"""What is computed: the networks, in the order in which a frame goes through them. Nothing here reads or writes files."""

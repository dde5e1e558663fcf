"""How a finished or running choice reads on the wire: one module per API, over what they share."""

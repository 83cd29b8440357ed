"""How calls are served: from the request on the wire through batches to the reply."""

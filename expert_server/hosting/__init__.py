"""Which experts a node hosts, and how their replicas are kept alike."""

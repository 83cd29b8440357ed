"""The DHT: a Kademlia node with bounds and validation, and look-ups of many keys at once."""

"""How bytes get from one peer to another: the p2pd process, tunnels through it, and addresses."""

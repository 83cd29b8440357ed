"""The commands with which a volunteer runs and controls a node."""

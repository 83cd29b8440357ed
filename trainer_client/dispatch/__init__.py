"""Sends rows to experts and collects their answers, even if some are late, lost or wrong."""

"""Sends rows to experts and collects their answers, in spite of late, lost and wrong ones."""

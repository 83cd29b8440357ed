"""What a volunteer runs and steers."""

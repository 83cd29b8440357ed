"""What a trainer runs, and what is done with a trained model."""

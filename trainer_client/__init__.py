"""The trainer: owns the dense part of a model, chooses experts and calls them."""

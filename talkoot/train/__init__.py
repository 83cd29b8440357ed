"""The commands that train a model and use a trained one."""

"""The user's model and data, borrowed."""

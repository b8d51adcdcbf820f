"""Everything that runs the model to learn what rounding costs."""

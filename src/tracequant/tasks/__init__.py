"""Tasks for the command line: a model with its data, loss and metric."""

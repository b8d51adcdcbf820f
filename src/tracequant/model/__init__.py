"""The user's model and data: the task, discovery of layers, hooks, state, device, processes."""

"""A run as pictures and pages; it reads `run`, which never calls it."""

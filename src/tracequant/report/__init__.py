"""A run as pictures: the report, its figures, and the figures of the paper."""

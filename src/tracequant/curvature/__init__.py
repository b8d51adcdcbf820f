"""Curvature of the loss: estimators of Hessian traces and eigenvalues, and their result."""

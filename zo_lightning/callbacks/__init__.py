"""Callbacks, one per file: each watches or steers a run with any module and any estimator, and can be left out."""

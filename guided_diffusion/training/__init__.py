"""Training a prior: its configuration, what it changes, its records and its loop."""

"""What `python -m fastkd.bench` runs."""

"""Pages that compare RUNs: times, accuracies, curves, and where students are wrong."""

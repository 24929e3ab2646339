"""HTML reports on RUNs: times, accuracies, curves, and errors by class."""

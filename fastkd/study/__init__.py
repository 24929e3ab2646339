"""study: train a grid of students, shared by any number of processes, and compare them with the baselines."""

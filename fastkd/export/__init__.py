"""Export a RUN's student, or the kept samples of a SUBSET as a data set."""

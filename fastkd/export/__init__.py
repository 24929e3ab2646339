"""Export the student of a RUN, or the kept samples of a SUBSET as a data set."""

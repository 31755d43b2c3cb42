"""Learning a table: which values the weights of one tensor may take, by k-means of several kinds."""

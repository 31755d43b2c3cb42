"""Passes that write a weight's own integers, or half floats, in place of the floats that they decode to."""

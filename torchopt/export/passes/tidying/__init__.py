"""Passes that make a file smaller or plainer, and change no number: names, attributes, shapes."""

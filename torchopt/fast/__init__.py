"""Code that is there for speed alone; each part has a plain equivalent that its test compares it with."""

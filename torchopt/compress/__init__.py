"""The verbs: the only room where masks, tables and scales meet, and where a compressed model is saved and loaded."""

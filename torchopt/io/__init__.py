"""Plain files and text: atomic writing, strict schemas, YAML with its lines, names in the user's code, progress bars. No torch."""

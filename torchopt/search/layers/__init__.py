"""Single layers: what each costs by itself, measured once and kept."""

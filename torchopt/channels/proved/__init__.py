"""The proof that a cut network computes what the whole one computes with those channels at zero."""

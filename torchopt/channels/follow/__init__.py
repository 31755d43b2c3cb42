"""Following channels through one forward call: every operator that runs hands their identities on."""

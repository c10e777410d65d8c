"""The bench: ours beside its peers, in turns, on the same data, against what the machine can do at best."""

"""One file per operation: its inputs, who computes it, and whether a result is right."""

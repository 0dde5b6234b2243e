"""What ablations exchange in our method, beyond its settings: votes, heads, keys, budget."""

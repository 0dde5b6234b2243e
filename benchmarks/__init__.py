"""Speed and answers, measured; results are committed under `results/`."""

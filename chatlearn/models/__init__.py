"""BaseModule, flow values and the contracts that a backend fulfils."""

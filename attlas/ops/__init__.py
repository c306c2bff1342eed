"""Functions on tensors, each with one meaning, an oracle and several backends."""

"""Linear-time attention: kernels, decays, flows, agents."""

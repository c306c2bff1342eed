"""The contract: masks, grids, states, specs, the two forms of a mechanism, the registry, errors."""

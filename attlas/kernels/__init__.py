"""Our own kernels, known to `ops` alone."""

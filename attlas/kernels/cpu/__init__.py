"""C++ kernels with a plain C interface, and what compiles them for the processor at hand."""

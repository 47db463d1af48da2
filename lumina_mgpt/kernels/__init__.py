"""Native CPU kernels: C++ sources, their build, the torch operators, and the choice between them and torch's."""

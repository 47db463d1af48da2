"""Native CPU kernels: C++ sources, their build, their torch operators, and the choice between them and torch's own."""

"""Kernels of this project for CPUs: sources, build, and the choice between them and torch's."""

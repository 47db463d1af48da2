"""MoVQGAN: pictures as grids of codes and back."""

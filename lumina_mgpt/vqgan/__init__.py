"""The image tokenizers VQGAN and MoVQGAN: convert images to grids of codes and back."""
